"""Devices that take a profile's time and really compute: the embedded model learns in virtual time.

Real stage workers' own executor holds the weights, and answers with what they say; the emulated one beside it
holds each op for as long as its profile says. So which version serves where and when is decided by the
profile's devices, and what it says by real training.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lemix.simulation.nodes import Compute
from services.stage_worker.compute.emulated import EmulatedExecutor
from services.stage_worker.compute.executor import (
    BackwardOutput,
    ForwardOutput,
    GiveWay,
    IterationOutput,
    ModelFacts,
    Rows,
    SequenceChunk,
    Took,
    go_on,
)
from services.stage_worker.compute.local_stages import LocalStages
from services.stage_worker.compute.sampling.sequences import SequenceState
from services.stage_worker.compute.torch_executor import TorchExecutor
from services.stage_worker.settings import StageWorkerSettings
from services.stage_worker.training.replica import Copied
from shared.errors import PeerLostError
from shared.messages.training import Microbatch, StepOrder
from shared.messages.weights import MergeGroup, OuterStep
from shared.settings import EMBEDDED_MODEL
from shared.tensors.ref import TensorRef

KV_TOKENS = 4096
"""Room of a node: the texts are short, and every node of a run lies in this machine's memory."""


def embedded_model() -> Compute:
    """Compute with the embedded model on this machine's processor, all stages of a run in one thread."""
    local, meetings = LocalStages(), Meetings()

    def compute(timed: EmulatedExecutor, settings: StageWorkerSettings, instance: str) -> "ComputingExecutor":
        computing = settings.model_copy(
            update={
                "model": EMBEDDED_MODEL,
                "device": "cpu",
                "kv_tokens": min(settings.kv_tokens or KV_TOKENS, KV_TOKENS),
                "max_iteration_tokens": settings.iteration_tokens,
            }
        )
        return ComputingExecutor(computing, instance, local, timed=timed, meetings=meetings)

    return compute


class Meetings:
    """Where members of a merge leave their tensors; who comes last puts the mean into all of them."""

    def __init__(self) -> None:
        self._here: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
        """Each member's tensors, by the meeting's name and the node."""
        self._over: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def mean_(self, name: str, node: int, flat: Tensor, group: MergeGroup, *, timeout_s: float) -> None:
        """Return when `flat` is the mean over the group, each member with its share.

        Raises PeerLostError when the others do not come in time.
        """
        here, over = self._here[name], self._over[name]
        here[node] = flat
        if len(here) == len(group.members):
            mean = torch.stack([here[member.node] * member.share for member in group.members]).sum(dim=0)
            for each in here.values():
                each.copy_(mean)
            over.set()
            del self._here[name], self._over[name]
        try:
            async with asyncio.timeout(timeout_s):
                await over.wait()
        except TimeoutError:
            raise PeerLostError(f"only nodes {sorted(here)} have come to {name}") from None


class ComputingExecutor(TorchExecutor):
    """Does each op at its beginning, then occupies the emulated device until its end; a step at its end."""

    def __init__(
        self,
        settings: StageWorkerSettings,
        instance: str,
        local: LocalStages,
        *,
        timed: EmulatedExecutor,
        meetings: Meetings,
    ) -> None:
        super().__init__(settings, instance, local)
        self._timed = timed
        self._meetings = meetings

    async def load(self) -> ModelFacts:
        timed = await self._timed.load()
        return replace(await super().load(), num_slices=timed.num_slices)

    async def iteration(
        self,
        chunks: Sequence[SequenceChunk],
        rows: Rows,
        version: int | None = None,
        states: Sequence[SequenceState] = (),
    ) -> IterationOutput:
        output = await super().iteration(chunks, rows, version, states)
        await self._timed.iteration(chunks, rows, None, states)
        return output

    async def forward(
        self,
        microbatch: Microbatch,
        rows: Rows,
        reference: TensorRef | None = None,
        give_way: GiveWay = go_on,
    ) -> ForwardOutput:
        output = await super().forward(microbatch, rows, reference)
        await self._timed.forward(microbatch, rows, reference, give_way)
        return output

    async def backward(
        self, batch_id: str, index: int, gradient: TensorRef | None, give_way: GiveWay = go_on
    ) -> BackwardOutput:
        output = await super().backward(batch_id, index, gradient)
        await self._timed.backward(batch_id, index, gradient, give_way)
        return output

    async def step(self, order: StepOrder, give_way: GiveWay = go_on) -> Took:
        await self._timed.step(order, give_way)
        return await super().step(order)

    async def restore(self, checkpoint: str, version: int) -> None:
        await super().restore(checkpoint, version)
        await self._timed.restore(checkpoint, version)

    async def rendezvous(self) -> str:
        return ""

    async def average(
        self, copied: Copied, group: MergeGroup, rendezvous: str, outer: OuterStep | None = None
    ) -> None:
        name = f"{group.name} of stage {self._settings.stage}"
        await self._meetings.mean_(
            name,
            self._settings.node,
            copied.tensors.flat,
            group,
            timeout_s=self._settings.collective_timeout_s,
        )
        await self._timed.average(None, group, rendezvous, outer)
