"""The stage's local queue: work in the order that a discipline chooses."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from services.stage_worker.pipeline.disciplines import Discipline, WorkKind, next_iteration
from shared.clock import Clock
from shared.errors import LemixError
from shared.slices import TRAINING_TURN

MAX_STARTED = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Work:
    """Something for the executor to do, and what to tell others afterwards."""

    kind: WorkKind
    since_s: float
    run: Callable[[], Awaitable[None]]
    gives_way: bool
    """Whether it asks, between its slices, if it must give way."""
    training_turn: float
    """How long what gave way to it goes on at least, in lengths of this."""


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
        self._is_sliced = False
        """Whether what runs gives way."""
        self._aside: asyncio.Future[float] | None = None
        """Done when what stands aside may go on: with the `training_turn` of what it gave way to."""
        self._turn_until_s = 0.0
        """An op that gives way need not do so before."""
        self._idle: deque[asyncio.Future[None]] = deque()
        """Workers that found nothing to do."""

    def __len__(self) -> int:
        return len(self._items)

    def put(
        self,
        kind: WorkKind,
        run: Callable[[], Awaitable[None]],
        *,
        gives_way: bool = False,
        training_turn: float = TRAINING_TURN,
    ) -> None:
        """Add an item. Raises LemixError when the queue is full: a peer does not keep to the protocol."""
        if len(self._items) >= self._max_items:
            raise LemixError(f"{self._max_items} items of work are waiting on this stage already")
        self._items.append(Work(kind, self._clock.now_s(), run, gives_way, training_turn))
        self._wake_one()

    @property
    def must_give_way(self) -> bool:
        """Whether what runs, between two of its slices, should let an iteration go first."""
        is_its_turn = self._is_sliced and self._clock.now_s() < self._turn_until_s
        return self._is_sliced and not is_its_turn and next_iteration(self._items) is not None

    async def give_way(self) -> None:
        """Stand aside for the iteration that waits; return when it has run."""
        began_s = self._clock.now_s()
        self._aside = asyncio.get_running_loop().create_future()
        self._wake_one()
        training_turn = await self._aside
        now_s = self._clock.now_s()
        self._turn_until_s = now_s + training_turn * (now_s - began_s)

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
        does one thing at a time, and need not wait for this loop between two iterations. Behind what gives
        way it is not: it runs when that stands aside.
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
                self._end(item)
            self._idle.append(asyncio.get_running_loop().create_future())
            await self._idle[-1]

    def _wake_one(self) -> None:
        if self._idle and not (idle := self._idle.popleft()).done():  # done: cancelled
            idle.set_result(None)

    def _next(self) -> Work | None:
        """The item to start now; None: there is none, or it has to wait."""
        index = self._next_index() if self._items and self._num_started < MAX_STARTED else None
        if index is None:
            return None
        item = self._items.pop(index)
        if item.kind in (WorkKind.BACKWARD, WorkKind.TRAINING_FORWARD):
            self._last_pass = item.kind
        if item.gives_way:
            self._is_sliced, self._turn_until_s = True, 0.0
        return item

    def _next_index(self) -> int | None:
        if self._is_sliced:
            return None if self._aside is None else next_iteration(self._items)
        index = self._discipline(self._items, self._clock.now_s(), self._last_pass)
        is_inference = self._items[index].kind is WorkKind.INFERENCE
        return index if is_inference or not self._num_started else None

    def _end(self, item: Work) -> None:
        self._num_started -= 1
        if item.gives_way:
            self._is_sliced = False
        elif self._aside is not None:
            self._aside.set_result(item.training_turn)
            self._aside = None
