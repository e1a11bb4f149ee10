"""Waiting for a moment more precisely than an event loop does."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from shared.clock import Clock


class Hold:
    """A thread in the device's place: uvloop's timers have steps of 1 ms, a thread wakes within 0.1 ms."""

    def __init__(self, clock: Clock, sleep: Callable[[float], None] = time.sleep) -> None:
        """`sleep` takes seconds, and may return a little early."""
        self._clock = clock
        self._sleep = sleep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="emulated")

    async def until(self, end_s: float) -> None:
        """Return when the clock shows `end_s`; in the order of the calls."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._sleep_until, end_s)

    def _sleep_until(self, end_s: float) -> None:
        while (left_s := end_s - self._clock.now_s()) > 0:
            self._sleep(left_s)
