"""The executor that only takes the time: a device that is as fast as a profile says, and computes nothing."""

import asyncio
import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.stage_worker.compute.executor import (
    BackwardOutput,
    ForwardOutput,
    GiveWay,
    IterationOutput,
    ModelFacts,
    Rows,
    ScoreOutput,
    SequenceChunk,
    ShardFiles,
    Took,
    go_on,
)
from services.stage_worker.compute.sampling.sequences import SequenceState
from services.stage_worker.pipeline.sizes import work_of_iteration, work_of_microbatch
from services.stage_worker.settings import StageWorkerSettings
from shared.clock import Clock
from shared.errors import LemixError, VersionGoneError
from shared.messages.cluster import LinkAnswer, LinkOffer, LinkPurpose
from shared.messages.inference import (
    FinishReason,
    Sampling,
    SequenceResult,
    SequenceStart,
    TokenLogprob,
)
from shared.messages.training import Microbatch, StepOrder
from shared.messages.weights import MergeGroup, OuterStep, SavedWeights
from shared.profiles.records import StageMemory
from shared.profiles.times import StageTimes
from shared.slices import WHOLE, NumSlices
from shared.tensors.ref import TensorRef

CARRIER = "inline"
NO_TENSOR = TensorRef(carrier=CARRIER, shape=(0,), dtype="float32", size_bytes=0)
"""Stands for activations and gradients: nobody looks into them."""

Snapshot = int
"""The version is all there is to a stage's weights."""


@dataclass(slots=True)
class EmulatedDevice:
    """A device as its stages share it."""

    free_at_s: float = 0.0
    """When everything begun so far is over."""
    slowdown: float = 1.0
    """Times that an op takes as long as it should."""


class EmulatedExecutor:
    """Implements `Executor`: one thing at a time, each for as long as `times` says.

    Activations of microbatches in flight take room, as `memory` says, unless they are offloaded or computed
    again (activation checkpointing), which takes time instead.

    Tokens follow from their positions alone, whatever a request asks of its text, and none ends its sequence
    before max_tokens. Losses shrink with the number of steps, for want of anything to compute them from.
    """

    def __init__(
        self,
        settings: StageWorkerSettings,
        instance: str,
        *,
        times: StageTimes,
        memory: StageMemory | None = None,
        vocab_size: int,
        context_length: int,
        num_slices: NumSlices = WHOLE,
        hold_until: Callable[[float], Awaitable[None]],
        clock: Clock,
        device: EmulatedDevice | None = None,
    ) -> None:
        """`hold_until` returns when `clock` shows the given time; `memory` None: there is no end of it;
        `device` None: the stage has its own.
        """
        self._settings = settings
        self._instance = instance
        self._times = times
        self._memory = memory
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._num_slices = num_slices
        self._hold_until = hold_until
        self._clock = clock
        self._is_last = settings.stage == settings.num_stages - 1
        self._device = device or EmulatedDevice()
        self._version = 0
        self._kept: set[int] = set()
        self._in_flight: dict[tuple[str, int], Microbatch] = {}
        """Microbatches between their forward and their backward."""

    async def load(self) -> ModelFacts:
        return ModelFacts(
            is_tied_across_stages=False,
            weights=SavedWeights(version=self._version, checkpoint=""),
            vocab_size=self._vocab_size,
            context_length=self._context_length,
            num_kv_blocks=self._settings.num_kv_blocks,
            num_slices=self._num_slices,
        )

    async def offer(self, peer: int, instance: str, purpose: LinkPurpose) -> LinkOffer:
        return LinkOffer(
            stage=self._settings.stage,
            instance=self._instance,
            purpose=purpose,
            carrier=CARRIER,
            place=str(self._settings.shm_dir / self._instance),
        )

    async def connect(self, peer: int, purpose: LinkPurpose, answer: LinkAnswer) -> None:
        pass

    def is_link_lost(self, peer: int, purpose: LinkPurpose) -> bool:
        return False

    async def accept(self, offer: LinkOffer) -> LinkAnswer:
        return LinkAnswer(accepted=True)

    def begin(self, start: SequenceStart) -> SequenceState:
        return SequenceState(start.gateway, start.sampling, prompt=set(start.prompt))

    async def iteration(
        self,
        chunks: Sequence[SequenceChunk],
        rows: Rows,
        version: int | None = None,
        states: Sequence[SequenceState] = (),
    ) -> IterationOutput:
        """Raises VersionGoneError when the stage does not have that version."""
        if version is not None and version not in (self._version, *self._kept):
            raise VersionGoneError(f"weights version {version} is gone")
        await self._occupy(self._times.iteration_s(work_of_iteration(chunks)))
        if not self._is_last:
            return IterationOutput(NO_TENSOR)
        results = tuple(
            self._result(chunk, state.sampling)
            for chunk, state in zip(chunks, states, strict=True)
            if chunk.targets or chunk.produces
        )
        return IterationOutput(None, results)

    async def forward(
        self,
        microbatch: Microbatch,
        rows: Rows,
        reference: TensorRef | None = None,
        give_way: GiveWay = go_on,
    ) -> ForwardOutput:
        """Raises MemoryError when what the backward will need does not fit."""
        self._check_room(microbatch)
        version, is_compared = self._version, microbatch.beta is not None
        forward_s = (1 + is_compared) * self._times.forward_s(work_of_microbatch(microbatch))
        forward_s += self._offload_s(microbatch)
        if self._is_last and not microbatch.backward_after_all:
            await self._pass(forward_s, give_way)
            await give_way()
            await self._pass(self._backward_s(microbatch), give_way)
            return ForwardOutput(version, loss=self._loss(microbatch), gradient=self._inputs_gradient)
        await self._pass(forward_s, give_way)
        self._in_flight[microbatch.batch_id, microbatch.index] = microbatch
        if self._is_last:
            return ForwardOutput(version, loss=self._loss(microbatch))
        return ForwardOutput(version, hidden=NO_TENSOR, reference=NO_TENSOR if is_compared else None)

    async def backward(
        self, batch_id: str, index: int, gradient: TensorRef | None, give_way: GiveWay = go_on
    ) -> BackwardOutput:
        """Raises LemixError when the microbatch is not in flight here."""
        microbatch = self._in_flight.pop((batch_id, index), None)
        if microbatch is None:
            raise LemixError(
                f"gradient for microbatch {index} of {batch_id}, which is not in flight on this stage"
            )
        if (again_s := self._again_s(microbatch)) > 0:
            await self._pass(again_s, give_way)
            await give_way()
        await self._pass(self._backward_s(microbatch), give_way)
        return BackwardOutput(self._inputs_gradient)

    @property
    def _inputs_gradient(self) -> TensorRef | None:
        return NO_TENSOR if self._settings.stage > 0 else None

    async def score(self, tokens: Sequence[int], hidden: TensorRef | None) -> ScoreOutput:
        return ScoreOutput(hidden=None if self._is_last else NO_TENSOR)

    async def discard(self, tensor: TensorRef) -> None:
        pass

    async def finish_batch(self, batch_id: str) -> TensorRef | None:
        return None

    async def measure(self, batch_id: str, tied: TensorRef | None) -> float:
        return 0.0

    async def step(self, order: StepOrder, give_way: GiveWay = go_on) -> Took:
        if not order.skip:
            await self._occupy_in_slices(self._times.step_s(), self._num_slices.of_step, give_way)
        self._version = order.version
        return ()

    async def keep(self) -> bool:
        self._kept.add(self._version)
        return True

    async def release(self, version: int) -> None:
        self._kept.discard(version)

    async def rendezvous(self) -> str:
        return ""

    async def copy_state(self) -> None:
        pass

    async def copy_gradients(self, batch_id: str) -> None:
        pass

    async def average(
        self, copied: None, group: MergeGroup, rendezvous: str, outer: OuterStep | None = None
    ) -> None:
        """Average in the time that the weights need to the host; the device goes on meanwhile."""
        if self._memory is not None:
            await asyncio.sleep(self._memory.load_s)

    async def adopt_state(self, mean: None, version: int) -> None:
        self._version = version

    async def adopt_gradients(self, mean: None, batch_id: str) -> float:
        return 0.0

    async def restore(self, checkpoint: str, version: int) -> None:
        self._in_flight.clear()
        self._version = version
        if self._memory is not None:
            await self._occupy(self._memory.load_s)

    async def snapshot(self) -> Snapshot:
        return self._version

    async def write(self, snapshot: Snapshot, folder: Path) -> ShardFiles:
        settings = self._settings
        name = f"model-{settings.stage + 1:05}-of-{settings.num_stages:05}.json"
        content = json.dumps({"version": snapshot}).encode()
        (folder / name).write_bytes(content)
        return ShardFiles(
            sha256_by_file={name: hashlib.sha256(content).hexdigest()},
            file_by_tensor={f"stage.{settings.stage}": name},
            size_bytes=len(content),
            written_bytes=len(content),
        )

    async def close(self) -> None:
        pass

    async def _pass(self, duration_s: float, give_way: GiveWay) -> None:
        await self._occupy_in_slices(duration_s, self._num_slices.of_pass, give_way)

    async def _occupy_in_slices(self, duration_s: float, count: int, give_way: GiveWay) -> None:
        """Occupy the device for an op, whose slices are equally long."""
        for place in range(count):
            if place:
                await give_way()
            await self._occupy(duration_s / count)

    async def _occupy(self, duration_s: float) -> None:
        """Occupy the device after its earlier ops."""
        self._device.free_at_s = max(self._clock.now_s(), self._device.free_at_s)
        self._device.free_at_s += self._device.slowdown * duration_s
        await self._hold_until(self._device.free_at_s)

    def _check_room(self, microbatch: Microbatch) -> None:
        """Raises MemoryError when the microbatch's activations do not fit."""
        if self._memory is None or microbatch.offload:
            return
        room = self._memory.activation_tokens
        kept = () if self._settings.activation_checkpointing else self._in_flight.values()
        taken = sum(sum(each.lengths) for each in kept if not each.offload)
        wanted = sum(microbatch.lengths)
        if taken + wanted > room:
            raise MemoryError(
                f"the activations of {wanted} tokens do not fit: {taken} of {room} tokens' room are taken"
            )

    def _backward_s(self, microbatch: Microbatch) -> float:
        return self._times.backward_s(work_of_microbatch(microbatch)) + self._offload_s(microbatch)

    def _again_s(self, microbatch: Microbatch) -> float:
        """Seconds of the forward that a backward repeats."""
        if not self._settings.activation_checkpointing:
            return 0.0
        return self._times.forward_s(work_of_microbatch(microbatch))

    def _offload_s(self, microbatch: Microbatch) -> float:
        """Seconds to the host in the forward, and back in the backward."""
        if self._memory is None or not microbatch.offload:
            return 0.0
        return self._memory.offload_s(sum(microbatch.lengths))

    def _result(self, chunk: SequenceChunk, sampling: Sampling) -> SequenceResult:
        token: TokenLogprob | None = None
        finish: FinishReason | None = None
        if chunk.produces and sampling.max_tokens > 0:
            token = self._with_logprobs(self._next_token(chunk, sampling), sampling)
        if chunk.produces and chunk.index + 1 >= sampling.max_tokens:
            finish = "length"
        return SequenceResult(
            task_id=chunk.task_id,
            prompt=tuple(self._with_logprobs(target, sampling) for target in chunk.targets),
            token=token,
            index=chunk.index,
            finish=finish,
        )

    def _next_token(self, chunk: SequenceChunk, sampling: Sampling) -> int:
        position = chunk.start + chunk.num_tokens
        tokens = (at % self._vocab_size for at in range(position, position + self._vocab_size))
        return next(token for token in tokens if token not in sampling.stop_token_ids)

    def _with_logprobs(self, token: int, sampling: Sampling) -> TokenLogprob:
        """Every token is as likely as any other."""
        num_top = sampling.num_logprobs
        if num_top is None:
            return TokenLogprob(token=token)
        logprob = -math.log(self._vocab_size)
        top = tuple((other, logprob) for other in range(num_top))
        return TokenLogprob(token=token, logprob=logprob, top=top)

    def _loss(self, microbatch: Microbatch) -> float:
        """The microbatch's share of a mean loss that falls from that of a guess towards 0."""
        num_guesses, num_choices = len(microbatch.labels), self._vocab_size
        if microbatch.beta is not None:
            num_guesses, num_choices = len(microbatch.lengths) // 2, 2
        return num_guesses * microbatch.loss_weight * math.log(num_choices) / (1 + self._version / 100)
