"""Work on long texts, beside the event loop: that has tokens to send meanwhile."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from services.gateway.http.errors import rate_limited

NUM_THREADS = 2
"""The work releases the interpreter's lock, so that two texts are read at the same time."""
SHORT = 256
"""Characters, or tokens, up to which the work is done at once: less than a thread costs."""

T = TypeVar("T")


class TextThreads:
    """Two threads, for as many texts as requests may run."""

    def __init__(self, max_waiting: int) -> None:
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="text")
        self._max_waiting = max_waiting
        self._num_waiting = 0

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work` on a text of `size` characters or tokens.

        Raises ApiError (429) when too many texts wait already, and whatever `work` raises.
        """
        if size <= SHORT:
            return work()
        if self._num_waiting >= self._max_waiting:
            raise rate_limited("too many texts wait to be tokenised")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._num_waiting -= 1
