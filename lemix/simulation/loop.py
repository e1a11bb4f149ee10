"""An event loop whose time is a number: it jumps to the next timer as soon as nothing else can run.

Nothing real can be waited for in it, no socket and no thread, so that a run is fast and always the same.
"""

import asyncio
import gc
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from itertools import count
from typing import Any, TypeVar, TypeVarTuple

from shared.errors import LemixError

GC_THRESHOLDS = (50_000, 20, 100)
"""A large simulation makes many objects and few cycles: the usual thresholds cost a tenth of the time."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class NothingToWaitForError(LemixError):
    """Every task waits, and no timer could ever wake one."""


class _Call(asyncio.TimerHandle):
    """A callback that is due; cheaper to make than its base, of which it keeps only the methods' names."""

    __slots__ = ("args", "at_s", "callback", "context")

    def __init__(
        self, at_s: float, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None
    ) -> None:
        self.at_s = at_s
        self.callback: Callable[..., object] | None = callback
        self.args = args
        self.context = copy_context() if context is None else context

    def __repr__(self) -> str:
        return f"<call of {self.callback} at {self.at_s}>"

    def cancel(self) -> None:
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return self.at_s


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """Time begins at 0. Callbacks that are due at the same time run in the order in which they were asked
    for. An error of one ends the loop. What would run in another thread runs at once instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stopping = False  # the base class sets it
        self._now_s = 0.0
        self._due: deque[_Call] = deque()
        self._timers: list[tuple[float, int, _Call]] = []
        """A heap."""
        self._numbers = count()

    def time(self) -> float:
        return self._now_s

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        call = _Call(self._now_s, callback, args, context)
        self._due.append(call)
        return call

    call_soon_threadsafe = call_soon

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        call = _Call(when, callback, args, context)
        heapq.heappush(self._timers, (when, next(self._numbers), call))
        return call

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - whoever awaits the future gets it
            done.set_exception(error)
        return done

    def _run_once(self) -> None:
        """Do everything that happens at one time; `run_forever` repeats this until it is told to stop."""
        due = self._due
        if not due:
            self._pass_time()
        while due and not self._stopping:
            call = due.popleft()
            if call.callback is not None:
                call.context.run(call.callback, *call.args)

    def _pass_time(self) -> None:
        """Go on to the next timer. Raises NothingToWaitForError when there is none."""
        timers = self._timers
        if not timers:
            raise NothingToWaitForError(
                f"at {self._now_s:g} s of virtual time every task waits and there is no timer: a deadlock"
            )
        self._now_s = max(self._now_s, timers[0][0])
        while timers and timers[0][0] <= self._now_s:
            self._due.append(heapq.heappop(timers)[2])


class VirtualClock:
    """A `Clock` that shows a loop's time; people's clocks show it as seconds since 1970."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.now_s = loop.time
        self.wall_s = loop.time

    async def sleep_until(self, at_s: float) -> None:
        """Return when it shows exactly `at_s`."""
        woken = self._loop.create_future()
        self._loop.call_at(at_s, _wake, woken)
        await woken


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():  # done: cancelled
        sleeper.set_result(None)


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` in virtual time. Raises NothingToWaitForError instead of hanging."""
    thresholds = gc.get_threshold()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(main)
    finally:
        gc.set_threshold(*thresholds)
