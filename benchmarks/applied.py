"""Waits until training batches are in the weights. The trainer tells: polling would blur the time."""

import asyncio
from typing import Self

from shared.bus.base import Incoming
from shared.bus.nats import NatsBus
from shared.messages.training import BatchApplied, BatchProgress
from shared.subjects import TRAIN_PROGRESS

DEADLINE_S = 300.0


class AppliedBatches:
    """Counts the batches of a cluster that the weights of some node contain."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._grown = asyncio.Condition()

    @classmethod
    async def listening(cls, bus: NatsBus) -> Self:
        applied = cls()
        await bus.subscribe(TRAIN_PROGRESS.at(), applied._on_progress)
        return applied

    async def wait_for(self, count: int) -> None:
        """Wait until `count` batches were applied since this object listens. Raises TimeoutError."""
        async with asyncio.timeout(DEADLINE_S), self._grown:
            await self._grown.wait_for(lambda: len(self._ids) >= count)

    async def _on_progress(self, incoming: Incoming[BatchProgress]) -> None:
        if isinstance(incoming.message.event, BatchApplied):
            async with self._grown:
                self._ids.add(incoming.message.event.batch_id)
                self._grown.notify_all()
