"""The bus of a process that holds several stages: what they tell each other does not leave the process.

A subject with a listener in this process goes to that listener as it is, unpacked and unchecked; every other
goes over the far bus. Listeners are on the far bus, too, for the senders in other processes.
"""

import asyncio
from collections import deque
from collections.abc import Collection
from typing import Any, TypeVar

from shared.bus.base import (
    MAX_RUNNING_REQUESTS,
    Bus,
    Handler,
    Incoming,
    Lease,
    Responder,
    Stored,
    StoredMessage,
    StreamReader,
    StreamSpec,
    StreamState,
    Subscription,
)
from shared.bus.dispatch import Dispatcher
from shared.errors import BusError, BusTimeoutError
from shared.messages.base import Message
from shared.subjects import RequestSubject, Subject

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)


MAX_WAITING = 65536
"""Near messages that may wait for one handler."""


class NearBus:
    """A `Bus` that wraps the process's own, which is closed with it."""

    def __init__(self, far: Bus, *, heard_elsewhere: Collection[str] = (), traceparent: str = "") -> None:
        """`heard_elsewhere`: names of subjects that other processes listen to as well: they go far only.

        `traceparent` goes with every near message that is published without one.
        """
        self._far = far
        self._heard_elsewhere = frozenset(heard_elsewhere)
        self._traceparent = traceparent
        self._dispatcher = Dispatcher()
        self._inboxes: dict[str, list[_Inbox]] = {}
        """By the subjects that are listened to here."""
        self._responders: dict[str, Responder[Any, Any]] = {}
        self.max_message_bytes = far.max_message_bytes

    @property
    def num_malformed(self) -> int:
        return self._far.num_malformed

    @property
    def num_reconnects(self) -> int:
        return self._far.num_reconnects

    async def publish(self, subject: Subject[M], message: M, *, traceparent: str = "") -> None:
        inboxes = self._inboxes.get(subject.name)
        if inboxes is None:
            await self._far.publish(subject, message, traceparent=traceparent)
            return
        incoming = Incoming(message, traceparent or self._traceparent)
        for inbox in inboxes:
            inbox.put(incoming)

    async def subscribe(self, subject: Subject[M], handler: Handler[M], *, queue: str = "") -> Subscription:
        if queue or subject.name in self._heard_elsewhere:
            return await self._far.subscribe(subject, handler, queue=queue)
        inbox = _Inbox(subject.name, handler, self._dispatcher)
        self._inboxes.setdefault(subject.name, []).append(inbox)
        return _Listening(self._inboxes, inbox, await self._far.subscribe(subject, inbox.handle))

    async def request(
        self, subject: RequestSubject[M, R], message: M, *, timeout_s: float, traceparent: str = ""
    ) -> R:
        """Near requests are answered in the asker's task, which ends when the asker has waited enough."""
        responder: Responder[M, R] | None = self._responders.get(subject.name)
        if responder is None:
            return await self._far.request(subject, message, timeout_s=timeout_s, traceparent=traceparent)
        try:
            async with asyncio.timeout(timeout_s):
                return await responder(Incoming(message, traceparent or self._traceparent))
        except TimeoutError as error:
            raise BusTimeoutError(f"{subject.name}: no answer within {timeout_s:g} s") from error

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
        self._responders[subject.name] = responder
        return _Answering(self._responders, subject.name, far)

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

    async def read_stored(self, stream: str, *, after_sequence: int) -> StoredMessage | None:
        return await self._far.read_stored(stream, after_sequence=after_sequence)

    async def next_fence(self, name: str) -> int:
        return await self._far.next_fence(name)

    async def read_lease(self, name: str) -> Lease | None:
        return await self._far.read_lease(name)

    async def write_lease(self, name: str, body: bytes, *, revision: int) -> None:
        await self._far.write_lease(name, body, revision=revision)

    async def wait_failed(self) -> None:
        near, far = self._dispatcher.failure.wait(), self._far.wait_failed()
        waiting = [asyncio.ensure_future(each) for each in (near, far)]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()
        finally:
            for one in waiting:
                one.cancel()

    async def close(self) -> None:
        for inboxes in self._inboxes.values():
            for inbox in inboxes:
                inbox.end()
        self._inboxes.clear()
        self._responders.clear()
        await self._far.close()


class _Inbox:
    """Near messages to one handler: they wait here for a task that hands them on, one by one."""

    def __init__(self, name: str, handler: Handler[Any], dispatcher: Dispatcher) -> None:
        self.name = name
        self._handler = handler
        self._dispatcher = dispatcher
        self._waiting: deque[Incoming[Any]] = deque()
        self._idle: asyncio.Future[None] | None = None
        """The task waits for this when there is no message."""
        self._turn = asyncio.Lock()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def put(self, incoming: Incoming[Any]) -> None:
        """Hand it over. When too many wait, the bus fails: the handler cannot keep up."""
        if len(self._waiting) >= MAX_WAITING:
            late = BusError(f"messages on {self.name} came faster than they were handled")
            self._dispatcher.failure.set(late)
        self._waiting.append(incoming)
        if self._idle is not None:
            self._idle.set_result(None)
            self._idle = None

    async def handle(self, incoming: Incoming[Any]) -> None:
        """Call the handler in its turn, whichever bus a message comes from."""
        async with self._turn:
            await self._handler(incoming)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while self._waiting:
                await self._dispatcher.guard(self.name, self.handle, self._waiting.popleft())
            self._idle = loop.create_future()
            await self._idle

    def end(self) -> None:
        self._waiting.clear()
        self._idle = None
        self._task.cancel()


class _Listening:
    """A `Subscription` on both buses."""

    def __init__(self, inboxes: dict[str, list[_Inbox]], inbox: _Inbox, far: Subscription) -> None:
        self._inboxes = inboxes
        self._inbox = inbox
        self._far = far

    async def unsubscribe(self) -> None:
        self._inbox.end()
        listening = self._inboxes.get(self._inbox.name, [])
        if self._inbox in listening:
            listening.remove(self._inbox)
        if not listening:
            self._inboxes.pop(self._inbox.name, None)
        await self._far.unsubscribe()


class _Answering:
    """A `Subscription` to requests on both buses."""

    def __init__(self, responders: dict[str, Responder[Any, Any]], name: str, far: Subscription) -> None:
        self._responders = responders
        self._name = name
        self._far = far

    async def unsubscribe(self) -> None:
        self._responders.pop(self._name, None)
        await self._far.unsubscribe()
