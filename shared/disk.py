"""Work on the disk, as services await it."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def on_disk(work: Callable[[], T]) -> T:
    """Run blocking work in a thread; a cancellation waits until it has come to its end.

    A thread cannot be stopped: without the wait a file could appear after its service has gone.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait([thread])
        raise
