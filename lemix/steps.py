"""How many optimizer steps the served weights contain, read from the scheduler's status."""

import asyncio
from collections.abc import Callable, Mapping

from lemix.status import fetch_status
from shared.bus.base import Bus
from shared.errors import LemixError
from shared.messages.cluster import ClusterStatus, NodeStatus

READY_DEADLINE_S = 60.0
STALL_DEADLINE_S = 60.0
POLL_S = 0.25


class StepsError(LemixError):
    """The cluster did not come as far as it should; the message says how far it came."""


def weights_versions(status: ClusterStatus) -> dict[int, int]:
    """By node, the version that all its stages have reached."""
    return {
        node.node: min(stage.weights_version for stage in node.stages) for node in status.nodes if node.stages
    }


async def wait_nodes_ready(bus: Bus, num_nodes: int) -> dict[int, int]:
    """Wait until so many nodes take requests, and the trainer has restored them, so that it takes batches.

    Returns the weights version of each. Raises StepsError.
    """
    ready = 0
    try:
        async with asyncio.timeout(READY_DEADLINE_S):
            while True:
                status = await fetch_status(bus)
                ready = sum(node.ready and _is_restored(node) for node in status.nodes)
                if ready >= num_nodes:
                    return weights_versions(status)
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise StepsError(f"{ready} of {num_nodes} nodes were ready after {READY_DEADLINE_S:.0f} s") from None


def _is_restored(node: NodeStatus) -> bool:
    return all(stage.epoch > 0 for stage in node.stages)


class StepCounter:
    """Counts the steps of all nodes since `start`.

    A training batch is one step on one node, and replicas are not merged, so the sum over the
    nodes is the number of batches applied.
    """

    def __init__(self, bus: Bus, start: Mapping[int, int]) -> None:
        self._bus = bus
        self._start = start

    async def count(self) -> int:
        """Steps that are in the weights of every stage of their node."""
        versions = weights_versions(await fetch_status(self._bus))
        return sum(version - self._start.get(node, 0) for node, version in versions.items())

    async def wait_for(self, num_steps: int, *, on_steps: Callable[[int], None]) -> None:
        """Wait until `num_steps` are counted. Raises StepsError after STALL_DEADLINE_S without a new one."""
        counted = 0
        while counted < num_steps:
            try:
                async with asyncio.timeout(STALL_DEADLINE_S):
                    now = await self._next_count(counted)
            except TimeoutError:
                stalled = f"no training step for {STALL_DEADLINE_S:.0f} s"
                raise StepsError(f"{stalled}: {counted} of {num_steps} batches were applied") from None
            on_steps(now - counted)
            counted = now

    async def _next_count(self, counted: int) -> int:
        while (now := await self.count()) == counted:  # noqa: ASYNC110  # asked over the bus
            await asyncio.sleep(POLL_S)
        return now
