"""Waiting for what other processes do: files and counters can only be looked at."""

import asyncio
from collections.abc import Callable

LOOK_EVERY_S = 0.05


async def until(condition: Callable[[], object], *, timeout_s: float = 60.0) -> None:
    """Return as soon as `condition` holds. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # nobody here could set an event
            await asyncio.sleep(LOOK_EVERY_S)
