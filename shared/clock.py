"""Time and ids are handed in, so that a simulated run can own them."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from typing import Protocol


class Clock(Protocol):
    """Where a service reads time."""

    def now_s(self) -> float:
        """Monotonic seconds; only differences within one process mean anything."""
        ...

    def wall_s(self) -> float:
        """Seconds since the Unix epoch, for people and file names; never for intervals."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()


async def on_time(every_s: float, *, at_most_late_s: float, clock: Clock) -> AsyncGenerator[None]:
    """Come back every `every_s`, for ever, but not where it is later than that by `at_most_late_s`.

    For a look at who has fallen silent: who stood still has not yet read what others said meanwhile.
    """
    while True:
        begun_s = clock.now_s()
        await asyncio.sleep(every_s)
        if clock.now_s() - begun_s <= every_s + at_most_late_s:
            yield


class IdSource:
    """Ids drawn from a generator that is handed in."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def new(self, prefix: str) -> str:
        """A fresh id such as `req-5f0c...` (64 random bits)."""
        return f"{prefix}-{self._rng.getrandbits(64):016x}"

    def seed(self) -> int:
        """A fresh 63-bit seed for one request's sampling."""
        return self._rng.getrandbits(63)
