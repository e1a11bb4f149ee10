"""The bus as services see it: typed subjects, requests with deadlines, durable streams."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from shared.messages.base import Message
from shared.subjects import RequestSubject, Subject

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)

SCHEMA_VERSION = "1"
SCHEMA_HEADER = "lemix-schema"
TRACE_HEADER = "traceparent"
MAX_RUNNING_REQUESTS = 64
"""Requests that one subscription answers at once, unless it says otherwise."""
ERROR_HEADER = "lemix-error"
"""On a reply that refuses: the HTTP status; the body is the reason."""
RETRY_HEADER = "lemix-retry-after"
"""On a reply that refuses for now: seconds after which to ask again."""


@dataclass(frozen=True, slots=True)
class Incoming(Generic[M]):
    """A message as its handler gets it."""

    message: M
    traceparent: str
    """W3C trace context of the sender; empty when it sent none."""


Handler = Callable[[Incoming[M]], Awaitable[None]]
Responder = Callable[[Incoming[M]], Awaitable[R]]


class Subscription(Protocol):
    """A live interest in a subject."""

    async def unsubscribe(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """A durable stream, kept by limits."""

    name: str
    subjects: tuple[str, ...]
    max_bytes: int = 1 << 30
    discard_old: bool = False
    """When it is full: the oldest messages make room. Otherwise new ones are refused."""


@dataclass(frozen=True, slots=True)
class StreamState:
    """A durable stream as it was found."""

    identity: str
    """The identity of this stream alone: one that is made anew under the same name has another."""
    first_sequence: int
    """The oldest message that is there; where there is none, the next to come."""
    last_sequence: int
    """The newest message that was ever stored; 0 before the first."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The answer of a durable stream to a message."""

    sequence: int
    """The place of the message in its stream."""
    is_repeat: bool
    """A message of the same id was there already, at that sequence: nothing was stored now."""


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message of a durable stream, as it lies there."""

    sequence: int
    body: bytes


@dataclass(frozen=True, slots=True)
class StreamMessage:
    """A message of a durable stream."""

    sequence: int
    body: bytes
    headers: dict[str, str]
    ack: Callable[[], Awaitable[None]]
    """Tell the stream that this message is done with for good."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as it lies in the bucket."""

    revision: int
    """Higher with every change: the number by which its holder knows it."""
    body: bytes


class StreamReader(Protocol):
    """Reads a durable stream in order."""

    async def next(self, *, timeout_s: float) -> StreamMessage | None:
        """The next message, as soon as it is there; None after `timeout_s` without one."""
        ...

    async def close(self) -> None: ...


class Bus(Protocol):
    """Carries messages. NATS and the memory bus hold the same contract (tests/contract).

    Handlers of one subscription run one after the other, in the order of arrival; a handler that
    raises fails the bus (`failure`), which ends the service: nothing is swallowed. A message that
    cannot be read is counted and logged, and does not reach the handler.
    """

    max_message_bytes: int

    @property
    def num_malformed(self) -> int:
        """Messages dropped so far because they could not be read."""
        ...

    @property
    def num_reconnects(self) -> int:
        """How often the connection was lost and is back: messages may have been lost each time."""
        ...

    async def publish(self, subject: Subject[M], message: M, *, traceparent: str = "") -> None:
        """Send to whoever listens now. Raises MessageTooLargeError before sending."""
        ...

    async def subscribe(self, subject: Subject[M], handler: Handler[M], *, queue: str = "") -> Subscription:
        """Call `handler` for each message; members of one `queue` share the messages."""
        ...

    async def request(
        self, subject: RequestSubject[M, R], message: M, *, timeout_s: float, traceparent: str = ""
    ) -> R:
        """Send and wait for the answer.

        Raises NoResponderError at once when nobody listens, BusTimeoutError after `timeout_s`,
        RefusedError when the responder refuses, MessageTooLargeError before sending.
        """
        ...

    async def respond(
        self,
        subject: RequestSubject[M, R],
        responder: Responder[M, R],
        *,
        queue: str = "",
        max_running: int = MAX_RUNNING_REQUESTS,
    ) -> Subscription:
        """Answer requests; a responder refuses by raising RefusedError.

        Requests run concurrently, at most `max_running` at once for this subscription, further ones wait in
        arrival order; a malformed request is answered with a refusal of code 400.
        """
        ...

    async def ensure_stream(self, spec: StreamSpec) -> StreamState:
        """Create the durable stream unless it exists; one that exists is left as it is."""
        ...

    async def purge_stream(self, stream: str, up_to_sequence: int) -> None:
        """Remove the messages up to this sequence, which makes room; the others keep their sequences."""
        ...

    async def publish_durable(
        self, subject: str, body: bytes, *, message_id: str = "", headers: dict[str, str] | None = None
    ) -> Stored:
        """Store a message; a repeated `message_id` is stored once.

        Raises MessageTooLargeError, or BusError when no stream takes it or the stream is full.
        """
        ...

    async def read_stream(self, stream: str, *, reader: str, after_sequence: int) -> StreamReader:
        """Read from the message after `after_sequence`; replaces an earlier reader of that name."""
        ...

    async def read_stored(self, stream: str, *, after_sequence: int) -> StoredMessage | None:
        """The oldest message after that one; None where there is none. Nobody's reading is changed by it."""
        ...

    async def next_fence(self, name: str) -> int:
        """Take the lease `name`, whoever held it, and empty it. Returns its revision (a fencing token).

        It is a durable number higher than every one given before for `name`.
        """
        ...

    async def read_lease(self, name: str) -> Lease | None:
        """The lease as it is now; None where nobody has ever taken it.

        Raises BusError when the bucket does not answer, within 5 s.
        """
        ...

    async def write_lease(self, name: str, body: bytes, *, revision: int) -> None:
        """Write into the lease, which gives it a new revision.

        Raises BusError when its revision is no longer this one, or when the bucket does not answer.
        """
        ...

    async def wait_failed(self) -> None:
        """Wait until the bus fails for good, then raise what made it fail."""
        ...

    async def close(self) -> None:
        """Flush what was published and leave; safe to call twice."""
        ...
