"""The bus inside one process and one event loop: no threads, no sockets, same contract as NATS.

Time is the loop's own (`asyncio.timeout`), so a loop with virtual time drives it, and nothing is
left to chance: the same calls give the same order. Simulations give messages a time on their way.
"""

import asyncio
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from shared.bus.base import (
    MAX_RUNNING_REQUESTS,
    TRACE_HEADER,
    Handler,
    Lease,
    Responder,
    Stored,
    StoredMessage,
    StreamMessage,
    StreamReader,
    StreamSpec,
    StreamState,
    Subscription,
)
from shared.bus.dispatch import HEADERS_BYTES, Dispatcher, Receiver, stored_size_bytes
from shared.errors import BusError, BusTimeoutError, MessageTooLargeError, NoResponderError, RefusedError
from shared.messages.base import Message
from shared.subjects import RequestSubject, Subject

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)

MAX_MESSAGE_BYTES = (1 << 20) - HEADERS_BYTES
"""The largest message of a NATS server, unless configured otherwise."""

_stream_numbers = itertools.count(1)
"""No two streams of this process are the same one."""


Carriage = Callable[[str], Sequence[float]]
"""subject -> the delays (seconds) after which copies of a message arrive there; none: it is lost."""
Route = tuple["MemoryBus | None", str]
"""Sender and subject."""
Observer = Callable[[str, Message, float], None]
"""Is told of each message that is sent: subject, message, now (the loop's seconds)."""


class MemoryBroker:
    """Connects all services of one simulated world."""

    def __init__(
        self,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        checks_sizes: bool = True,
        latency_s: float = 0.0,
        carriage: Carriage | None = None,
        observe: Observer | None = None,
    ) -> None:
        """`checks_sizes`: whether messages that are too large raise, which costs packing each of them.
        `carriage`: what happens to messages on their way; None: they take `latency_s`, all alike.
        """
        self.max_message_bytes = max_message_bytes
        self.checks_sizes = checks_sizes
        self.streams: dict[str, _Stream] = {}
        self._interests: dict[str, _Interest] = {}
        self.leases: dict[str, Lease] = {}
        self._latency_s = latency_s
        self._carriage = carriage
        self._observe = observe
        self._transit = _Transit()

    def connect(self, *, traceparent: str = "") -> "MemoryBus":
        """A bus for one service; `traceparent` goes with every message published without one."""
        return MemoryBus(self, traceparent)

    def route(self, delivery: "_MemoryDelivery") -> bool:
        """Send the message to where it belongs; False when nobody listens."""
        if self._observe is not None:
            self._observe(delivery.subject, delivery.message, asyncio.get_running_loop().time())
        interest = self._interests.get(delivery.subject)
        if interest is None:
            return False
        for inbox in interest.next_inboxes():
            self._carry(delivery.sender, delivery.subject, partial(inbox.put, delivery))
        return True

    def answer(self, question: "_MemoryDelivery", answer: Message | RefusedError) -> None:
        """Send the answer to where the question came from."""
        if self._observe is not None and isinstance(answer, Message):
            self._observe(f"{question.subject}.answer", answer, asyncio.get_running_loop().time())
        self._carry(None, question.subject, partial(question.settle, answer))

    def _carry(self, sender: "MemoryBus | None", subject: str, arrive: Callable[[], None]) -> None:
        if self._carriage is not None:
            for delay_s in self._carriage(subject):
                self._transit.add_in_order((sender, subject), delay_s, arrive)
        elif self._latency_s:
            self._transit.add(asyncio.get_running_loop().time() + self._latency_s, arrive)
        else:
            arrive()

    def add(self, inbox: "_Inbox") -> None:
        self._interests.setdefault(inbox.subject, _Interest()).add(inbox)

    def remove(self, inbox: "_Inbox") -> None:
        interest = self._interests.get(inbox.subject)
        if interest is not None and interest.remove(inbox):
            del self._interests[inbox.subject]

    def stream_of(self, subject: str) -> "_Stream":
        """The stream that takes the subject. Raises BusError when none does."""
        for stream in self.streams.values():
            if subject in stream.spec.subjects:
                return stream
        raise BusError(f"{subject}: no stream takes it")

    def write_lease(self, name: str, body: bytes) -> int:
        """Returns the new revision."""
        revision = self.leases[name].revision + 1 if name in self.leases else 1
        self.leases[name] = Lease(revision, body)
        return revision


class _Transit:
    """Messages on their way."""

    def __init__(self) -> None:
        self._due: dict[float, list[Callable[[], None]]] = {}
        """The deliveries at each time, in order; the loop has one timer for each."""
        self._last_s: defaultdict[Route, float] = defaultdict(float)
        """When the newest message of each route arrives."""

    def add(self, due_s: float, arrive: Callable[[], None]) -> None:
        if due_s in self._due:
            self._due[due_s].append(arrive)
        else:
            self._due[due_s] = [arrive]
            asyncio.get_running_loop().call_at(due_s, self._arrive, due_s)

    def add_in_order(self, route: Route, delay_s: float, arrive: Callable[[], None]) -> None:
        """Not to arrive before what was sent before it on the same route."""
        now_s = asyncio.get_running_loop().time()
        self._last_s[route] = max(now_s + delay_s, self._last_s[route])
        self.add(self._last_s[route], arrive)

    def _arrive(self, due_s: float) -> None:
        for arrive in self._due.pop(due_s):
            arrive()


class MemoryBus:
    """A `Bus` to a MemoryBroker. Make it with `MemoryBroker.connect`."""

    def __init__(self, broker: MemoryBroker, traceparent: str) -> None:
        self.broker = broker
        self._traceparent = traceparent
        self._dispatcher = Dispatcher()
        self._inboxes: list[_Inbox] = []
        self._closed = False
        self._is_cut = False
        self.max_message_bytes = broker.max_message_bytes
        self.num_reconnects = 0
        """Nothing is ever lost here; tests may say that it was."""

    @property
    def num_malformed(self) -> int:
        return self._dispatcher.num_malformed

    async def publish(self, subject: Subject[M], message: M, *, traceparent: str = "") -> None:
        self._send(subject.name, message, traceparent, answer=None)

    async def subscribe(self, subject: Subject[M], handler: Handler[M], *, queue: str = "") -> Subscription:
        return self._receive(subject.name, queue, self._dispatcher.handling(subject, handler))

    async def request(
        self, subject: RequestSubject[M, R], message: M, *, timeout_s: float, traceparent: str = ""
    ) -> R:
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        if not self._send(subject.name, message, traceparent, answer):
            raise NoResponderError(f"{subject.name}: nobody listens")
        try:
            async with asyncio.timeout(timeout_s):
                reply = await answer
        except TimeoutError as error:
            raise BusTimeoutError(f"{subject.name}: no answer within {timeout_s:g} s") from error
        return _read(reply, subject.reply)

    async def respond(
        self,
        subject: RequestSubject[M, R],
        responder: Responder[M, R],
        *,
        queue: str = "",
        max_running: int = MAX_RUNNING_REQUESTS,
    ) -> Subscription:
        return self._receive(
            subject.name, queue, self._dispatcher.answering(subject, responder, max_running=max_running)
        )

    def _send(
        self, name: str, message: Message, traceparent: str, answer: "asyncio.Future[Message] | None"
    ) -> bool:
        self._check_open()
        if self._is_cut:
            return True
        self.check_size_of(message, name)
        return self.broker.route(
            _MemoryDelivery(self, name, message, traceparent or self._traceparent, answer)
        )

    def _receive(self, name: str, queue: str, receiver: Receiver) -> Subscription:
        self._check_open()
        inbox = _Inbox(self.broker, name, queue, receiver)
        self.broker.add(inbox)
        self._inboxes.append(inbox)
        return inbox

    def _check_open(self) -> None:
        if self._closed:
            raise BusError("the bus is closed")

    def check_size_of(self, message: Message, name: str) -> None:
        """Raises MessageTooLargeError."""
        if self.broker.checks_sizes:
            self.check_size(name, len(message.pack()))

    def check_size(self, name: str, size_bytes: int) -> None:
        """Raises MessageTooLargeError."""
        if size_bytes > self.max_message_bytes:
            raise MessageTooLargeError(f"{size_bytes} bytes for {name}, at most {self.max_message_bytes}")

    async def ensure_stream(self, spec: StreamSpec) -> StreamState:
        if spec.name not in self.broker.streams:
            self.broker.streams[spec.name] = _Stream(spec)
        stream = self.broker.streams[spec.name]
        return StreamState(stream.identity, stream.num_removed + 1, stream.last_sequence)

    async def purge_stream(self, stream: str, up_to_sequence: int) -> None:
        self._stream(stream).purge(up_to_sequence)

    async def publish_durable(
        self, subject: str, body: bytes, *, message_id: str = "", headers: dict[str, str] | None = None
    ) -> Stored:
        self._check_open()
        sent = ({TRACE_HEADER: self._traceparent} if self._traceparent else {}) | (headers or {})
        self.check_size(subject, stored_size_bytes(body, sent))
        return self.broker.stream_of(subject).append(body, message_id, sent)

    async def read_stream(self, stream: str, *, reader: str, after_sequence: int) -> StreamReader:
        return _MemoryStreamReader(self._stream(stream), reader, after_sequence)

    async def read_stored(self, stream: str, *, after_sequence: int) -> StoredMessage | None:
        found = self._stream(stream).after(after_sequence)
        return StoredMessage(found.sequence, found.body) if found else None

    def _stream(self, name: str) -> "_Stream":
        if name not in self.broker.streams:
            raise BusError(f"{name}: there is no such stream")
        return self.broker.streams[name]

    async def next_fence(self, name: str) -> int:
        return self.broker.write_lease(name, b"")

    async def read_lease(self, name: str) -> Lease | None:
        return self.broker.leases.get(name)

    async def write_lease(self, name: str, body: bytes, *, revision: int) -> None:
        held = self.broker.leases.get(name)
        if held is None or held.revision != revision:
            raise BusError(f"{name}: the lease is not of revision {revision}")
        self.broker.write_lease(name, body)

    async def wait_failed(self) -> None:
        await self._dispatcher.failure.wait()

    def cut(self) -> None:
        """The process has died: nothing more goes out or comes in, and nobody is told."""
        self._is_cut = True
        for inbox in self._inboxes:
            inbox.end()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for inbox in self._inboxes:
            inbox.end()
        await self._dispatcher.close()


def _read(message: Message, kind: type[M]) -> M:
    """The frozen message itself; one of another type goes through its bytes, as over a wire."""
    return message if type(message) is kind else kind.unpack(message.pack())


@dataclass(slots=True)
class _MemoryDelivery:
    """A `Delivery` that holds the sender's frozen message."""

    sender: MemoryBus
    subject: str
    message: Message
    traceparent: str
    asker: "asyncio.Future[Message] | None"

    @property
    def size_bytes(self) -> int:
        return len(self.message.pack())

    def read(self, kind: type[M]) -> M:
        return _read(self.message, kind)

    async def reply(self, message: Message) -> None:
        self.sender.check_size_of(message, "a reply")
        self.sender.broker.answer(self, message)

    async def refuse(self, refusal: RefusedError) -> None:
        # A copy: the responder's own has its traceback, and both sides may raise theirs.
        copy = RefusedError(refusal.reason, code=refusal.code, retry_after_s=refusal.retry_after_s)
        self.sender.broker.answer(self, copy)

    def settle(self, answer: Message | RefusedError) -> None:
        """The answer has arrived; the first one counts."""
        if self.asker is None or self.asker.done():
            return
        if isinstance(answer, RefusedError):
            self.asker.set_exception(answer)
        else:
            self.asker.set_result(answer)


class _Inbox:
    """A `Subscription`: messages wait here for a task that hands them on, one by one."""

    def __init__(self, broker: MemoryBroker, subject: str, queue: str, receiver: Receiver) -> None:
        self.subject = subject
        self.queue = queue
        self._broker = broker
        self._receiver = receiver
        self._waiting: deque[_MemoryDelivery] = deque()
        self._task: asyncio.Task[None] | None = None
        """Begins with the first message."""
        self._idle: asyncio.Future[None] | None = None
        """The task waits for this when there is no message."""
        self._is_over = False

    def put(self, delivery: _MemoryDelivery) -> None:
        if self._is_over:
            return
        self._waiting.append(delivery)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        elif self._idle is not None:
            self._idle.set_result(None)
            self._idle = None

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while self._waiting:
                await self._receiver(self._waiting.popleft())
            self._idle = loop.create_future()
            await self._idle

    async def unsubscribe(self) -> None:
        self.end()

    def end(self) -> None:
        self._is_over = True
        self._broker.remove(self)
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()


@dataclass(slots=True)
class _Interest:
    """Who listens on one subject; members of a queue take turns."""

    everyone: list[_Inbox] = field(default_factory=list)
    queues: dict[str, deque[_Inbox]] = field(default_factory=dict)

    def add(self, inbox: _Inbox) -> None:
        if inbox.queue:
            self.queues.setdefault(inbox.queue, deque()).append(inbox)
        else:
            self.everyone.append(inbox)

    def remove(self, inbox: _Inbox) -> bool:
        """Forget the inbox; True when nobody is left."""
        members = self.queues.get(inbox.queue, self.everyone) if inbox.queue else self.everyone
        if inbox in members:
            members.remove(inbox)
        if inbox.queue and not members:
            self.queues.pop(inbox.queue, None)
        return not self.everyone and not self.queues

    def next_inboxes(self) -> list[_Inbox]:
        chosen = list(self.everyone)
        for members in self.queues.values():
            chosen.append(members[0])
            members.rotate(-1)
        return chosen


class _Stream:
    """A durable stream, as durable as the process."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self.identity = f"memory-{next(_stream_numbers)}"
        self.messages: deque[tuple[bytes, dict[str, str]]] = deque()
        """The last of them has `last_sequence`."""
        self.last_sequence = 0
        self.readers: dict[str, _MemoryStreamReader] = {}
        self.grown = asyncio.Event()
        """Set, and replaced, whenever a reader may have something to look at."""
        self._sequence_by_id: dict[str, int] = {}
        self._size_bytes = 0

    def append(self, body: bytes, message_id: str, headers: dict[str, str]) -> Stored:
        """Store a message. Raises BusError when the stream is full."""
        if message_id in self._sequence_by_id:
            return Stored(sequence=self._sequence_by_id[message_id], is_repeat=True)
        if self.spec.discard_old and len(body) <= self.spec.max_bytes:
            while not self._has_room(body):
                self._remove_first()
        if not self._has_room(body):
            raise BusError(f"{self.spec.name}: the stream is full ({self.spec.max_bytes} bytes)")
        self._size_bytes += len(body)
        self.messages.append((body, headers))
        self.last_sequence += 1
        if message_id:
            self._sequence_by_id[message_id] = self.last_sequence
        self.wake()
        return Stored(sequence=self.last_sequence, is_repeat=False)

    def purge(self, up_to_sequence: int) -> None:
        while self.messages and self.num_removed < up_to_sequence:
            self._remove_first()

    def after(self, sequence: int) -> StreamMessage | None:
        """The oldest message after that one, where there is one."""
        place = max(sequence - self.num_removed, 0)
        if place >= len(self.messages):
            return None
        body, headers = self.messages[place]
        return StreamMessage(self.num_removed + place + 1, body, headers, _ack)

    @property
    def num_removed(self) -> int:
        """The number of removed messages: all up to this sequence."""
        return self.last_sequence - len(self.messages)

    def _has_room(self, body: bytes) -> bool:
        return self._size_bytes + len(body) <= self.spec.max_bytes

    def _remove_first(self) -> None:
        body, _ = self.messages.popleft()
        self._size_bytes -= len(body)

    def wake(self) -> None:
        self.grown.set()
        self.grown = asyncio.Event()


class _MemoryStreamReader:
    """Acknowledging changes nothing here: the position is the reader's own."""

    def __init__(self, stream: _Stream, name: str, after_sequence: int) -> None:
        self._stream = stream
        self._name = name
        self._last_sequence = after_sequence
        stream.readers[name] = self
        stream.wake()

    async def next(self, *, timeout_s: float) -> StreamMessage | None:
        try:
            async with asyncio.timeout(timeout_s):
                while (found := self._find()) is None:
                    await self._stream.grown.wait()
        except TimeoutError:
            return None
        self._last_sequence = found.sequence
        return found

    def _find(self) -> StreamMessage | None:
        if self._stream.readers[self._name] is not self:
            raise BusError(f"another reader {self._name!r} of {self._stream.spec.name} has taken over")
        return self._stream.after(self._last_sequence)

    async def close(self) -> None:
        pass


async def _ack() -> None:
    pass
