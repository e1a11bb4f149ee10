"""The stage's local queue: work in the order that a discipline chooses."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from services.stage_worker.pipeline.disciplines import Discipline, WorkKind
from shared.clock import Clock
from shared.errors import LemixError

MAX_STARTED = 2

log = logging.getLogger(__name__)


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
        self._num_started = 0
        self._last_pass: WorkKind | None = None
        """Whether the last microbatch went forward or backward; None before the first one."""
        self._idle: deque[asyncio.Future[None]] = deque()
        """Workers that found nothing to do."""

    def __len__(self) -> int:
        return len(self._items)

    def put(self, kind: WorkKind, run: Callable[[], Awaitable[None]]) -> None:
        """Add an item. Raises LemixError when the queue is full: a peer does not keep to the protocol."""
        if len(self._items) >= self._max_items:
            raise LemixError(f"{self._max_items} items of work are waiting on this stage already")
        self._items.append(Work(kind, self._clock.now_s(), run))
        self._wake_one()

    async def do_in_turn(self, work: Callable[[], Awaitable[None]], *, within_s: float) -> None:
        """Do this between two other ops, unless the asker has gone by then.

        Raises what `work` raises, and TimeoutError.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            if done.done():
                return
            try:
                await work()
            except Exception as error:
                if done.done():
                    log.exception("nobody waits any more for what has failed")
                else:
                    done.set_exception(error)
            else:
                if not done.done():
                    done.set_result(None)

        self.put(WorkKind.CONTROL, run)
        async with asyncio.timeout(within_s):
            await done

    async def run(self) -> None:
        """Work for ever.

        Behind the running item the next one is handed to the executor too if it is inference: the executor
        does one thing at a time, and need not wait for this loop between two iterations.
        """
        async with asyncio.TaskGroup() as group:
            for _ in range(MAX_STARTED):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            while (item := self._next()) is not None:
                self._num_started += 1
                if self._items:
                    self._wake_one()
                await item.run()
                self._num_started -= 1
            self._idle.append(asyncio.get_running_loop().create_future())
            await self._idle[-1]

    def _wake_one(self) -> None:
        if self._idle and not (idle := self._idle.popleft()).done():  # done: cancelled
            idle.set_result(None)

    def _next(self) -> Work | None:
        if not self._items or self._num_started >= MAX_STARTED:
            return None
        index = self._discipline(self._items, self._clock.now_s(), self._last_pass)
        if self._num_started and self._items[index].kind is not WorkKind.INFERENCE:
            return None
        item = self._items.pop(index)
        if item.kind in (WorkKind.BACKWARD, WorkKind.TRAINING_FORWARD):
            self._last_pass = item.kind
        return item
