"""The executor that computes: one stage of a Hugging Face model, in one thread of its own."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from services.stage_worker.checkpoint import shard_files as files
from services.stage_worker.checkpoint.staging import CpuLane, CudaLane, StateCopies
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
from services.stage_worker.compute.graphs import capture_for
from services.stage_worker.compute.handoff import Handoff
from services.stage_worker.compute.loading import load_model
from services.stage_worker.compute.local_stages import LocalStages
from services.stage_worker.compute.model_source import ModelSource
from services.stage_worker.compute.op_timer import timer_for
from services.stage_worker.compute.sampling.grammar import GrammarCompiler, Vocabulary
from services.stage_worker.compute.sampling.sequences import SequenceState
from services.stage_worker.compute.slices import Slices, advance, finish
from services.stage_worker.compute.stage_compute import StageCompute
from services.stage_worker.settings import StageWorkerSettings
from services.stage_worker.training.peers import Peers
from services.stage_worker.training.replica import Copied
from shared.messages.cluster import LinkAnswer, LinkOffer, LinkPurpose
from shared.messages.inference import SequenceStart
from shared.messages.training import Microbatch, StepOrder
from shared.messages.weights import MergeGroup, OuterStep
from shared.tensors.ref import TensorRef

P = ParamSpec("P")
T = TypeVar("T")


def torch_executors() -> Callable[[StageWorkerSettings, str], "TorchExecutor"]:
    """A maker of the executors of one process."""
    local = LocalStages()
    return lambda settings, instance: TorchExecutor(settings, instance, local)


class TorchExecutor:
    """Implements `Executor` on `cpu` or `cuda:N`."""

    def __init__(
        self, settings: StageWorkerSettings, instance: str, local: LocalStages | None = None
    ) -> None:
        """`local`: what the executors of this process share; None: there is no other."""
        self._settings = settings
        self._instance = instance
        self._local = local or LocalStages()
        self._device = torch.device(settings.device)
        self._capture = capture_for(self._device)
        self._timer = timer_for(self._device)
        self._thread, self._streams = self._local.enter(instance, settings.device)
        self._peers = Peers(
            node=settings.node,
            device=self._device,
            host=settings.collective_host,
            timeout_s=settings.collective_timeout_s,
        )
        self._peers_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="peers")
        self._copies = StateCopies(CudaLane(self._device) if self._device.type == "cuda" else CpuLane())
        self._handoff = Handoff(settings, instance, self._device, self._local)
        self._grammars = GrammarCompiler(self._vocabulary)
        self._source = ModelSource(settings)
        self._model: StageCompute | None = None

    async def load(self) -> ModelFacts:
        return await self._run(self._load)

    async def offer(self, peer: int, instance: str, purpose: LinkPurpose) -> LinkOffer:
        stage = self._compute.loaded.stage
        return await self._run(
            self._handoff.offer,
            peer,
            instance,
            purpose,
            hidden_size=stage.hidden_size,
            vocab_size=stage.vocab_size,
        )

    async def connect(self, peer: int, purpose: LinkPurpose, answer: LinkAnswer) -> None:
        await self._run(self._handoff.connect, peer, purpose, answer)

    def is_link_lost(self, peer: int, purpose: LinkPurpose) -> bool:
        return self._handoff.is_lost(peer, purpose)

    async def accept(self, offer: LinkOffer) -> LinkAnswer:
        return await self._run(self._handoff.accept, offer)

    def begin(self, start: SequenceStart) -> SequenceState:
        text = start.sampling.grammar
        grammar = None if text is None else self._grammars.begin(text)
        state = SequenceState(start.gateway, start.sampling, grammar, set(start.prompt))
        for token in start.given:
            state.drew(token)
        return state

    async def iteration(
        self,
        chunks: Sequence[SequenceChunk],
        rows: Rows,
        version: int | None = None,
        states: Sequence[SequenceState] = (),
    ) -> IterationOutput:
        return await self._run(self._compute.iteration, chunks, rows, version, states)

    async def forward(
        self,
        microbatch: Microbatch,
        rows: Rows,
        reference: TensorRef | None = None,
        give_way: GiveWay = go_on,
    ) -> ForwardOutput:
        op = self._compute.forward(microbatch, rows, reference)
        forwarded, took = await self._run_in_slices(op, give_way)
        loss = None if forwarded.loss is None else forwarded.loss.item()
        return replace(forwarded.output, loss=loss, took=took)

    async def backward(
        self, batch_id: str, index: int, gradient: TensorRef | None, give_way: GiveWay = go_on
    ) -> BackwardOutput:
        op = self._compute.backward(batch_id, index, gradient)
        return BackwardOutput(*await self._run_in_slices(op, give_way))

    async def score(self, tokens: Sequence[int], hidden: TensorRef | None) -> ScoreOutput:
        return await self._run(self._compute.score, tokens, hidden)

    async def discard(self, tensor: TensorRef) -> None:
        await self._run(self._handoff.discard, tensor)

    async def finish_batch(self, batch_id: str) -> TensorRef | None:
        return await self._run(self._compute.finish_batch, batch_id)

    async def measure(self, batch_id: str, tied: TensorRef | None) -> float:
        return await self._run(self._compute.measure, batch_id, tied)

    async def step(self, order: StepOrder, give_way: GiveWay = go_on) -> Took:
        _, took = await self._run_in_slices(self._compute.step(order), give_way)
        return took

    async def keep(self) -> bool:
        return await self._run(self._compute.keep)

    async def release(self, version: int) -> None:
        await self._run(self._compute.release, version)

    async def rendezvous(self) -> str:
        return await asyncio.to_thread(self._peers.rendezvous)

    async def copy_state(self) -> Copied:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._peers_thread, self._compute.loaded.replica.copy_state)

    async def copy_gradients(self, batch_id: str) -> Copied:
        return await self._run(self._compute.loaded.replica.copy_gradients, batch_id)

    async def average(
        self, copied: Copied, group: MergeGroup, rendezvous: str, outer: OuterStep | None = None
    ) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._peers_thread, self._average, copied, group, rendezvous, outer)

    async def adopt_state(self, mean: Copied, version: int) -> None:
        await self._run(self._compute.adopt_state, mean, version)

    async def adopt_gradients(self, mean: Copied, batch_id: str) -> float:
        return await self._run(self._compute.adopt_gradients, mean, batch_id)

    async def restore(self, checkpoint: str, version: int) -> None:
        await self._run(self._compute.restore, checkpoint, version)

    async def snapshot(self) -> Future[files.Snapshot]:
        return await self._run(self._compute.snapshot)

    async def write(self, snapshot: Future[files.Snapshot], folder: Path) -> ShardFiles:
        layers = self._compute.loaded.stage.layers
        return await asyncio.to_thread(lambda: files.write_shard(snapshot.result(), folder, layers))

    async def close(self) -> None:
        self._handoff.close()
        self._peers.close()
        self._grammars.close()
        self._copies.close()
        self._local.leave(self._instance)
        self._peers_thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))

    async def _run_in_slices(self, op: Slices[T], give_way: GiveWay) -> tuple[T, Took]:
        """Give way between two slices where there are any: there the device has done what has returned."""
        if self._compute.loaded.microbatches.num_slices == 1:
            return await self._run_until_done(finish, op)
        while (done := await self._run(advance, op)) is None:
            await give_way()
        return done.value, ()

    async def _run_until_done(
        self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[T, Took]:
        """Run it until the device has done it, too: what decodes next has no more than one op ahead of it."""

        def launch() -> tuple[T, Took]:
            end = self._timer()
            return work(*args, **kwargs), end()

        result, took = await self._run(launch)
        for part in took:
            await asyncio.to_thread(part.wait_s)
        return result, took

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self._settings.model, self._compute.loaded.stage.vocab_size)

    @property
    def _compute(self) -> StageCompute:
        assert self._model is not None, "load() comes first"
        return self._model

    # In the thread that waits for peers.

    def _average(self, copied: Copied, group: MergeGroup, rendezvous: str, outer: OuterStep | None) -> None:
        if len(group.members) > 1:
            self._peers.mean_(copied.tensors.flat, group, rendezvous)
        if outer is not None:
            self._compute.loaded.replica.make_outer_step(copied, outer)

    # In the compute thread.

    def _load(self) -> ModelFacts:
        settings = self._settings
        torch.set_num_threads(settings.num_threads)
        loaded, facts = load_model(
            settings, self._source, self._device, capture=self._capture, streams=self._streams
        )
        self._model = StageCompute(
            loaded,
            settings,
            device=self._device,
            source=self._source,
            handoff=self._handoff,
            copies=self._copies,
            streams=self._streams,
            timer=self._timer,
        )
        return facts
