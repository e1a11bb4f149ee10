"""The stage's local queue: one item of work at a time, the next one chosen by a discipline."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from services.stage_worker.queue import Discipline, WorkKind
from shared.clock import Clock
from shared.errors import LemixError


@dataclass(frozen=True, slots=True)
class Work:
    """Something for the executor to do, and what to tell others afterwards."""

    kind: WorkKind
    since_s: float
    run: Callable[[], Awaitable[None]]


class WorkQueue:
    """Bounded; an error of an item ends `run`, and with it the service."""

    def __init__(self, clock: Clock, discipline: Discipline, *, max_items: int) -> None:
        self._clock = clock
        self._discipline = discipline
        self._max_items = max_items
        self._items: list[Work] = []
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, kind: WorkKind, run: Callable[[], Awaitable[None]]) -> None:
        """Add an item. Raises LemixError when the queue is full: a peer does not keep to the protocol."""
        if len(self._items) >= self._max_items:
            raise LemixError(f"{self._max_items} items of work are waiting on this stage already")
        self._items.append(Work(kind, self._clock.now_s(), run))
        self._arrived.set()

    async def run(self) -> None:
        """Work for ever."""
        while True:
            await self._arrived.wait()
            while self._items:
                item = self._items.pop(self._discipline(self._items, self._clock.now_s()))
                await item.run()
            self._arrived.clear()
