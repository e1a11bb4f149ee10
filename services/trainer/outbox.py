"""Messages to publish, in order: those who decide need not wait for the bus."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from shared.bus.base import Bus
from shared.messages.base import Message
from shared.subjects import Subject

M = TypeVar("M", bound=Message)


class Outbox:
    """Messages in order. Bounded by their sources: a microbatch per node in flight, one per ended batch."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._queue: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()

    def post(self, subject: Subject[M], message: M, traceparent: str = "") -> None:
        self._queue.put_nowait(partial(self._bus.publish, subject, message, traceparent=traceparent))

    async def run(self) -> None:
        """Publish for ever. Raises BusError when the bus refuses."""
        while True:
            send = await self._queue.get()
            await send()
