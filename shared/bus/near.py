"""The bus of a process that holds several stages: what they tell each other does not leave the process.

A subject with a listener in this process goes to that listener as it is, unpacked and unchecked; every other
goes over the far bus. Listeners are on the far bus, too, for the senders in other processes.
"""

import asyncio
from collections.abc import Collection
from typing import TypeVar

from shared.bus.base import (
    MAX_RUNNING_REQUESTS,
    Bus,
    Handler,
    Incoming,
    Responder,
    Stored,
    StreamReader,
    StreamSpec,
    StreamState,
    Subscription,
)
from shared.bus.memory import MemoryBroker
from shared.messages.base import Message
from shared.subjects import RequestSubject, Subject

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)


class NearBus:
    """A `Bus` that wraps the process's own, which is closed with it."""

    def __init__(self, far: Bus, *, heard_elsewhere: Collection[str] = (), traceparent: str = "") -> None:
        """`heard_elsewhere`: names of subjects that other processes listen to as well: they go far only.

        `traceparent` goes with every near message that is published without one.
        """
        self._far = far
        self._heard_elsewhere = frozenset(heard_elsewhere)
        self._broker = MemoryBroker(checks_sizes=False)
        self._near = self._broker.connect(traceparent=traceparent)
        self.max_message_bytes = far.max_message_bytes

    @property
    def num_malformed(self) -> int:
        return self._far.num_malformed

    @property
    def num_reconnects(self) -> int:
        return self._far.num_reconnects

    async def publish(self, subject: Subject[M], message: M, *, traceparent: str = "") -> None:
        await self._bus_to(subject.name).publish(subject, message, traceparent=traceparent)

    async def subscribe(self, subject: Subject[M], handler: Handler[M], *, queue: str = "") -> Subscription:
        if queue or subject.name in self._heard_elsewhere:
            return await self._far.subscribe(subject, handler, queue=queue)
        in_turn = _one_by_one(handler)
        return _Both(
            await self._near.subscribe(subject, in_turn), await self._far.subscribe(subject, in_turn)
        )

    async def request(
        self, subject: RequestSubject[M, R], message: M, *, timeout_s: float, traceparent: str = ""
    ) -> R:
        bus = self._bus_to(subject.name)
        return await bus.request(subject, message, timeout_s=timeout_s, traceparent=traceparent)

    async def respond(
        self,
        subject: RequestSubject[M, R],
        responder: Responder[M, R],
        *,
        queue: str = "",
        max_running: int = MAX_RUNNING_REQUESTS,
    ) -> Subscription:
        far = await self._far.respond(subject, responder, queue=queue, max_running=max_running)
        if queue or subject.name in self._heard_elsewhere:
            return far
        return _Both(await self._near.respond(subject, responder, max_running=max_running), far)

    async def ensure_stream(self, spec: StreamSpec) -> StreamState:
        return await self._far.ensure_stream(spec)

    async def purge_stream(self, stream: str, up_to_sequence: int) -> None:
        await self._far.purge_stream(stream, up_to_sequence)

    async def publish_durable(
        self, subject: str, body: bytes, *, message_id: str = "", headers: dict[str, str] | None = None
    ) -> Stored:
        return await self._far.publish_durable(subject, body, message_id=message_id, headers=headers)

    async def read_stream(self, stream: str, *, reader: str, after_sequence: int) -> StreamReader:
        return await self._far.read_stream(stream, reader=reader, after_sequence=after_sequence)

    async def next_epoch(self, name: str) -> int:
        return await self._far.next_epoch(name)

    async def wait_failed(self) -> None:
        waiting = [asyncio.ensure_future(bus.wait_failed()) for bus in (self._near, self._far)]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()
        finally:
            for one in waiting:
                one.cancel()

    async def close(self) -> None:
        await self._near.close()
        await self._far.close()

    def _bus_to(self, subject: str) -> Bus:
        return self._near if self._broker.has_listener(subject) else self._far


class _Both:
    """A `Subscription` on both buses."""

    def __init__(self, near: Subscription, far: Subscription) -> None:
        self._near = near
        self._far = far

    async def unsubscribe(self) -> None:
        await self._near.unsubscribe()
        await self._far.unsubscribe()


def _one_by_one(handler: Handler[M]) -> Handler[M]:
    """The handler, called for one message at a time, whichever bus each comes from."""
    turn = asyncio.Lock()

    async def handle(incoming: Incoming[M]) -> None:
        async with turn:
            await handler(incoming)

    return handle
