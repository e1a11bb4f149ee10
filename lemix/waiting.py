"""Waits for a running cluster: until its nodes are ready, and until batches are in its weights."""

import asyncio
import itertools
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Self

from lemix.status import fetch_status, fetch_weights
from shared.bus.base import Bus, Incoming
from shared.errors import BusError, LemixError
from shared.messages.cluster import NodeStatus
from shared.messages.training import (
    MAX_BATCHES_OF_MESSAGE,
    BatchApplied,
    BatchDurable,
    BatchesAsked,
    BatchEvent,
    BatchHeldOut,
    BatchProgress,
    BatchRejected,
)
from shared.messages.weights import NodeWeights
from shared.subjects import TRAIN_PROGRESS, TRAIN_STATUS

READY_DEADLINE_S = 60.0
POLL_S = 0.25
STALL_DEADLINE_S = 60.0
SILENCE_S = 2.0
"""Events can be lost: after so long without one the trainer is asked."""
ANSWER_DEADLINE_S = 5.0
NO_NODE = -1
"""Where a batch trained that trained nothing."""


class ProgressError(LemixError):
    """The cluster did not come as far as it should; the message says how far it came."""


async def wait_nodes_ready(bus: Bus, num_nodes: int) -> None:
    """Wait until so many nodes take requests, and the trainer has restored them, so that it takes batches.

    Raises ProgressError.
    """
    ready = 0
    try:
        async with asyncio.timeout(READY_DEADLINE_S):
            while (ready := await _num_ready(bus)) < num_nodes:  # noqa: ASYNC110  # asked over the bus
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        reason = f"{ready} of {num_nodes} nodes were ready after {READY_DEADLINE_S:.0f} s"
        raise ProgressError(reason) from None


async def _num_ready(bus: Bus) -> int:
    return sum(node.ready and _is_restored(node) for node in (await fetch_status(bus)).nodes)


def _is_restored(node: NodeStatus) -> bool:
    return all(stage.fence > 0 for stage in node.stages)


async def judged_weights(bus: Bus, within_s: float) -> list[tuple[NodeWeights, int]]:
    """The nodes with a guard, once it has judged the versions that they have now; each with that version.

    After `within_s` it may not have, or they may still be restored.
    """
    versions: dict[int, int] = {}
    found: list[NodeWeights] = []
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            while True:
                with suppress(BusError):  # one answer is not waited for alone
                    nodes = (await fetch_weights(bus)).nodes
                    found = [node for node in nodes if node.is_guarded]
                    restored = {node.node: node.version for node in found if node.published is not None}
                    versions = restored | versions
                    if nodes and all(_is_judged(node, versions.get(node.node)) for node in found):
                        break
                await asyncio.sleep(POLL_S)
    return [(node, versions.get(node.node, node.version)) for node in found]


def _is_judged(node: NodeWeights, version: int | None) -> bool:
    """`version`: the one to judge; None: the node is not restored yet."""
    return version is not None and not node.awaits_verdict(version)


class AppliedBatches:
    """Which batches the weights contain, told by the trainer: each once, however many nodes share it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._steps: dict[str, tuple[int, int | str]] = {}
        """By batch: the node, and the version or another name of the step."""
        self.losses: dict[str, float] = {}
        """By batch, before its step; in the order of the steps."""
        self._rejected: dict[str, str] = {}
        """Reasons."""
        self._news = asyncio.Event()

    @classmethod
    async def following(cls, bus: Bus) -> Self:
        """Follow from now on; earlier batches are asked for when they are waited for."""
        applied = cls(bus)
        await bus.subscribe(TRAIN_PROGRESS.at(), applied._on_progress)
        return applied

    @property
    def num_batches(self) -> int:
        """The number of batches that were heard of."""
        return len(self._steps)

    @property
    def num_steps(self) -> int:
        """That these batches took part in, summed over the nodes."""
        return len(set(self._steps.values()))

    async def wait_for(
        self,
        batch_ids: Collection[str],
        *,
        on_applied: Callable[[int], None] = lambda number: None,
        stall_s: float = STALL_DEADLINE_S,
    ) -> None:
        """Wait until the weights contain all these batches; `on_applied` hears of how many more do.

        Raises ProgressError when one is rejected, or after `stall_s` without another one.
        """
        missing = set(batch_ids)
        while missing:
            came = await self._some_of(missing, stall_s)
            if not came:
                applied = len(set(batch_ids)) - len(missing)
                stalled = f"no training step for {stall_s:.0f} s"
                raise ProgressError(f"{stalled}: {applied} of {len(batch_ids)} batches were applied")
            missing -= came
            on_applied(len(came))

    async def _some_of(self, missing: set[str], stall_s: float) -> set[str]:
        """Those of the batches that are applied, once one is; none after `stall_s`.

        Raises ProgressError when one is rejected.
        """
        ask_at_s = asyncio.get_running_loop().time() + SILENCE_S
        try:
            async with asyncio.timeout(stall_s):
                while not (came := missing & self._steps.keys()):
                    self._check_rejected(missing)
                    if not await self._heard_before(ask_at_s):
                        await self._ask(missing)
                        ask_at_s += SILENCE_S
                return came
        except TimeoutError:
            return set()

    def _check_rejected(self, batch_ids: set[str]) -> None:
        if lost := sorted(batch_ids & self._rejected.keys()):
            raise ProgressError(f"batch {lost[0]} was rejected: {self._rejected[lost[0]]}")

    async def _heard_before(self, deadline_s: float) -> bool:
        """Wait for any news; False when there are none until then."""
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def _ask(self, batch_ids: Collection[str]) -> None:
        some = tuple(itertools.islice(sorted(batch_ids), MAX_BATCHES_OF_MESSAGE))
        try:
            now = await self._bus.request(
                TRAIN_STATUS.at(), BatchesAsked(batch_ids=some), timeout_s=ANSWER_DEADLINE_S
            )
        except BusError:  # the trainer may be starting again
            return
        for event in now.events:
            self._note(event)

    async def _on_progress(self, incoming: Incoming[BatchProgress]) -> None:
        self._note(incoming.message.event)

    def _note(self, event: BatchEvent) -> None:
        match event:
            case BatchApplied(batch_id=batch_id, node=node, version=version, loss=loss):
                self._steps[batch_id] = node, version
                self.losses[batch_id] = loss
            case BatchDurable(batch_ids=batch_ids, node=node):
                self._steps = {batch_id: (node, batch_id) for batch_id in batch_ids} | self._steps
            case BatchHeldOut(batch_id=batch_id):
                self._steps[batch_id] = NO_NODE, batch_id
            case BatchRejected(batch_id=batch_id, reason=reason):
                self._rejected[batch_id] = reason
        self._news.set()
        self._news = asyncio.Event()  # for the next news
