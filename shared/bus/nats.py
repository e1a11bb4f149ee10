"""The bus over NATS and JetStream. The only file that knows nats-py."""

import asyncio
import contextlib
import logging
import random
import secrets
import ssl
from collections.abc import Iterator, Mapping
from typing import Any, Self, TypeVar

import nats.errors
from nats.aio.client import Client, Server
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    Header,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import BadRequestError, NotFoundError, ServerError

from shared.addresses import NatsAddress, nats_address
from shared.bus.access import OPEN, Access
from shared.bus.base import (
    ERROR_HEADER,
    MAX_RUNNING_REQUESTS,
    RETRY_HEADER,
    SCHEMA_HEADER,
    SCHEMA_VERSION,
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
from shared.bus.dispatch import CLOSE_TIMEOUT_S, HEADERS_BYTES, Dispatcher, Receiver, stored_size_bytes
from shared.bus.refusals import Refusals
from shared.errors import (
    BusError,
    BusTimeoutError,
    MalformedMessageError,
    MessageTooLargeError,
    NoResponderError,
    NotAllowedError,
    RefusedError,
)
from shared.messages.base import Message
from shared.subjects import FENCE_BUCKET, FENCE_STREAM, RequestSubject, Subject

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)

CONNECT_TIMEOUT_S = 10.0
JETSTREAM_TIMEOUT_S = 5.0
RETRY_S = 0.1
PING_TIMEOUT_S = 2
PING_INTERVAL_S = 5
"""Two unanswered pings end a connection: a hung server is noticed within 15 s."""
FETCH_SLICE_S = 1.0
"""A pull that was pending over a server restart is lost; no pull lives longer than this."""
ACK_WAIT_S = 3600.0
MAX_ACK_PENDING = 4096
STREAM_NAME_IN_USE = 10058
STORE_TOO_SMALL = 10047
NO_MESSAGE_FOUND = 10037
AUTHORIZATION_VIOLATION = "authorization violation"
JETSTREAM_API = "$JS.API."
ANY_SUBJECT = ">"

log = logging.getLogger(__name__)


class NatsBus:
    """A `Bus` of one connection to a NATS server. Make it with `connect`."""

    def __init__(self, client: Client, traceparent: str, access: Access = OPEN) -> None:
        self._client = client
        self._access = access
        self._refusals = Refusals(access.user)
        self._is_let_in = False
        self._jetstream = client.jetstream(timeout=JETSTREAM_TIMEOUT_S)
        self._dispatcher = Dispatcher()
        self._traceparent = traceparent
        self._closing = False
        self.max_message_bytes = 0

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        name: str,
        access: Access = OPEN,
        traceparent: str = "",
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> Self:
        """Connect to a server of `url`; `traceparent` goes with what is published without one.

        Raises NotAllowedError at once when the server does not know the user or cannot be trusted, BusError
        when none answers within `timeout_s`.
        """
        place = nats_address(url)
        client = _TlsClient() if place.wants_tls else Client()
        bus = cls(client, traceparent, access)
        address = f"NATS at {place}"
        try:
            with _cancellable():
                async with asyncio.timeout(timeout_s):
                    await client.connect(list(place.servers), name=name, **_login(place), **bus._options())
        except asyncio.CancelledError:
            await bus.close()
            raise
        except NotAllowedError as error:
            await bus.close()
            raise NotAllowedError(f"{address}: {error}") from error
        except (TimeoutError, OSError, nats.errors.Error) as error:
            raise BusError(f"no connection to {address}: {client.last_error or error}") from error
        bus._is_let_in = True
        bus.max_message_bytes = client.max_payload - HEADERS_BYTES
        return bus

    def _options(self) -> dict[str, Any]:
        user, seed, tls = self._access.user, self._access.seed, self._access.tls
        return {
            **({"nkeys_seed_str": seed, "inbox_prefix": user.inbox_prefix} if user else {}),
            **({"tls": tls} if tls else {}),
            "max_reconnect_attempts": -1,
            "reconnect_time_wait": RETRY_S,
            "reconnect_to_server_handler": _next_server,
            "ping_interval": PING_INTERVAL_S,
            "error_cb": self._on_error,
            "disconnected_cb": self._on_disconnected,
            "reconnected_cb": self._on_reconnected,
            "closed_cb": self._on_closed,
        }

    @property
    def num_malformed(self) -> int:
        return self._dispatcher.num_malformed

    @property
    def num_reconnects(self) -> int:
        return int(self._client.stats["reconnects"])

    # nats-py awaits these on its reading path, and an exception would stop its reconnecting.

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self._dispatcher.failure.set(
                BusError(f"messages on {error.subject} came faster than they were handled")
            )
        elif self._refusals.is_noted(error):
            log.error("NATS: %s", self._refusals.newest)
        elif refusal := _refusal_of(error, self._access):
            self._dispatcher.failure.set(refusal)
            if not self._is_let_in:  # nobody waits for the bus to fail before it is connected
                raise refusal
        elif isinstance(error, OSError | nats.errors.StaleConnectionError):
            log.debug("connection to NATS: %s", error)
            if _num_cancels():  # the task is to end; nats-py would connect again and again: see _cancellable
                raise asyncio.CancelledError
        else:
            log.warning("NATS: %s", error)

    async def _on_disconnected(self) -> None:
        if not self._closing:
            log.warning("connection to NATS lost; reconnecting")

    async def _on_reconnected(self) -> None:
        log.warning("connection to NATS is back")

    async def _on_closed(self) -> None:
        if not self._closing:
            self._dispatcher.failure.set(BusError(f"NATS closed the connection: {self._client.last_error}"))

    async def publish(self, subject: Subject[M], message: M, *, traceparent: str = "") -> None:
        body = self._packed(subject.name, message)
        with _translated(subject.name):
            await self._client.publish(subject.name, body, headers=self._headers(traceparent))

    async def subscribe(self, subject: Subject[M], handler: Handler[M], *, queue: str = "") -> Subscription:
        return await self._receive(subject.name, queue, self._dispatcher.handling(subject, handler))

    async def request(
        self, subject: RequestSubject[M, R], message: M, *, timeout_s: float, traceparent: str = ""
    ) -> R:
        body = self._packed(subject.name, message)
        with _translated(subject.name):
            async with self._refusals.raised(subject.name):
                reply = await self._client.request(
                    subject.name, body, timeout=timeout_s, headers=self._headers(traceparent)
                )
        if reply.headers and ERROR_HEADER in reply.headers:
            raise _refusal_in(reply.data, reply.headers)
        return subject.reply.unpack(reply.data)

    async def respond(
        self,
        subject: RequestSubject[M, R],
        responder: Responder[M, R],
        *,
        queue: str = "",
        max_running: int = MAX_RUNNING_REQUESTS,
    ) -> Subscription:
        return await self._receive(
            subject.name, queue, self._dispatcher.answering(subject, responder, max_running=max_running)
        )

    async def _receive(self, name: str, queue: str, receiver: Receiver) -> Subscription:
        async def on_message(msg: Msg) -> None:
            await receiver(_NatsDelivery(self, msg))

        with _translated(name):
            subscription = await self._client.subscribe(name, queue=queue, cb=on_message)
            # After this the server knows: what anybody publishes from now on arrives. Twice, because
            # nats-py sends the first flush's PING ahead of the command that still waits for its flusher.
            await self._client.flush()
            await self._client.flush()
        self._refusals.check_heard(name)
        return _Subscription(subscription)

    async def reply_to(self, msg: Msg, body: bytes, headers: dict[str, str]) -> None:
        """Answer `msg`, if its sender wants an answer."""
        if msg.reply:
            traceparent = (msg.headers or {}).get(TRACE_HEADER, "")
            with _translated(msg.reply):
                await self._client.publish(msg.reply, body, headers=self._headers(traceparent) | headers)

    def _packed(self, name: str, message: Message) -> bytes:
        body = message.pack()
        self.check_size(name, len(body))
        return body

    def check_size(self, name: str, size_bytes: int) -> None:
        """Raises MessageTooLargeError."""
        if size_bytes > self.max_message_bytes:
            raise MessageTooLargeError(f"{size_bytes} bytes for {name}, at most {self.max_message_bytes}")

    def _headers(self, traceparent: str) -> dict[str, str]:
        trace = traceparent or self._traceparent
        return (
            {SCHEMA_HEADER: SCHEMA_VERSION, TRACE_HEADER: trace} if trace else {SCHEMA_HEADER: SCHEMA_VERSION}
        )

    async def ensure_stream(self, spec: StreamSpec) -> StreamState:
        config = StreamConfig(
            name=spec.name,
            subjects=list(spec.subjects),
            retention=RetentionPolicy.LIMITS,
            discard=DiscardPolicy.OLD if spec.discard_old else DiscardPolicy.NEW,
            storage=StorageType.FILE,
            max_bytes=spec.max_bytes,
        )
        with _translated(spec.name), _enough_room(spec):
            async with self._refusals.raised(JETSTREAM_API):
                try:
                    found = await self._jetstream.add_stream(config)
                except BadRequestError as error:
                    if error.err_code != STREAM_NAME_IN_USE:
                        raise
                    found = await self._jetstream.stream_info(spec.name)
        assert found.created is not None
        first_sequence = max(found.state.first_seq, 1)  # 0 before the first message
        return StreamState(found.created.isoformat(), first_sequence, found.state.last_seq)

    async def purge_stream(self, stream: str, up_to_sequence: int) -> None:
        if up_to_sequence > 0:  # 0 would purge everything
            with _translated(stream):
                async with self._refusals.raised(JETSTREAM_API):
                    await self._jetstream.purge_stream(stream, seq=up_to_sequence + 1)

    async def publish_durable(
        self, subject: str, body: bytes, *, message_id: str = "", headers: dict[str, str] | None = None
    ) -> Stored:
        sent = self._headers("") | (headers or {}) | ({Header.MSG_ID.value: message_id} if message_id else {})
        self.check_size(subject, stored_size_bytes(body, sent))
        with _translated(subject):
            async with self._refusals.raised(subject):
                stored = await self._jetstream.publish(subject, body, headers=sent)
        return Stored(sequence=stored.seq, is_repeat=bool(stored.duplicate))

    async def read_stream(self, stream: str, *, reader: str, after_sequence: int) -> StreamReader:
        with _translated(stream):
            async with self._refusals.raised(JETSTREAM_API):
                return await _NatsStreamReader.open(
                    self._client, self._jetstream, stream, reader, after_sequence
                )

    async def read_stored(self, stream: str, *, after_sequence: int) -> StoredMessage | None:
        with _translated(stream):
            async with self._refusals.raised(JETSTREAM_API):
                try:
                    found = await self._jetstream.get_msg(
                        stream, seq=after_sequence + 1, subject=ANY_SUBJECT, next=True
                    )
                except NotFoundError as error:
                    if error.err_code != NO_MESSAGE_FOUND:
                        raise
                    return None
        assert found.seq is not None
        return StoredMessage(found.seq, found.data or b"")

    async def next_fence(self, name: str) -> int:
        with _translated(name):
            async with self._refusals.raised(JETSTREAM_API, f"$KV.{FENCE_BUCKET}."):
                bucket = await self._jetstream.create_key_value(bucket=FENCE_BUCKET, storage=StorageType.FILE)
                return await bucket.put(name, b"")

    async def answers(self) -> bool:
        """Whether there is a connection, and the server answers within PING_TIMEOUT_S."""
        try:
            with _cancellable():
                await self._client.flush(timeout=PING_TIMEOUT_S)
        except nats.errors.Error:
            return False
        return bool(self._client.is_connected)

    async def read_lease(self, name: str) -> Lease | None:
        with _translated(name):
            async with self._refusals.raised(JETSTREAM_API):
                try:  # not by nats-py's bucket, which asks for more than a stage may ask
                    found = await self._jetstream.get_msg(FENCE_STREAM, subject=_key(name))
                except NotFoundError:  # the key, or the bucket
                    return None
        assert found.seq is not None
        return Lease(found.seq, found.data or b"")

    async def write_lease(self, name: str, body: bytes, *, revision: int) -> None:
        expected = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(revision)}
        with _translated(name):
            async with self._refusals.raised(_key(name)):
                await self._jetstream.publish(_key(name), body, headers=expected)

    async def wait_failed(self) -> None:
        await self._dispatcher.failure.wait()

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        await self._dispatcher.close()
        # Not nats-py's drain: it swallows cancellation and can wait far beyond any deadline.
        leaving = asyncio.get_running_loop().create_task(self._leave())
        await asyncio.wait({leaving}, timeout=CLOSE_TIMEOUT_S)
        if not leaving.done():
            leaving.cancel()

    async def _leave(self) -> None:
        if self._client.is_connected:
            with contextlib.suppress(nats.errors.Error):
                await self._client.flush(timeout=1)
        await self._client.close()


def _key(name: str) -> str:
    """The subject of a lease's key."""
    return f"$KV.{FENCE_BUCKET}.{name}"


class _TlsClient(Client):
    """Sends nothing over a connection that is not encrypted, whatever the server says that it offers."""

    def _connect_command(self) -> bytes:
        if not self._server_info.get("tls_required"):
            raise nats.errors.Error("the server speaks no TLS, and LEMIX_NATS_URL asks for it")
        return super()._connect_command()


def _refusal_of(error: Exception, access: Access) -> NotAllowedError | None:
    """The reason why trying again would not help; None: it may."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return NotAllowedError(f"the server's certificate is not trusted (LEMIX_NATS_CA): {error}")
    if AUTHORIZATION_VIOLATION not in str(error).lower():
        return None
    if access.user is None:
        return NotAllowedError("the server asks for a user: name the folder of its users in LEMIX_NATS_USERS")
    return NotAllowedError(f"the server does not know the user {access.user.name!r} of {access.file}")


def _login(place: NatsAddress) -> dict[str, Any]:
    """The user of an address, as nats-py takes it; alone it is a token."""
    if place.user is None:
        return {}
    if place.password is None:
        return {"token": place.user}
    return {"user": place.user, "password": place.password}


def _next_server(servers: list[Server], _info: dict[str, Any]) -> tuple[Server, float]:
    """Any server after a random wait, so that a restarted server is not met by all clients at once."""
    return random.choice(servers), random.uniform(0.5 * RETRY_S, 2 * RETRY_S)


class _cancellable:
    """Around calls of nats-py: a cancellation is raised that came together with what they waited for.

    Until Python 3.12 asyncio.wait_for then returns or raises that, and whoever cancelled waits for ever.
    """

    __slots__ = ("_num_cancels",)

    def __enter__(self) -> None:
        self._num_cancels = _num_cancels()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if (error is None or isinstance(error, Exception)) and _num_cancels() > self._num_cancels:
            raise asyncio.CancelledError from error


def _num_cancels() -> int:
    """How often the running task was cancelled."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


@contextlib.contextmanager
def _enough_room(spec: StreamSpec) -> Iterator[None]:
    """Raises BusError that says what a stream needs, where the server's store is too small for it."""
    try:
        yield
    except ServerError as error:
        if error.err_code != STORE_TOO_SMALL:
            raise
        raise BusError(
            f"stream {spec.name} needs {spec.max_bytes / 2**30:g} GiB, and the NATS server has less left for"
            " streams: set max_file_store in its configuration, or make room on its disk"
        ) from error


class _translated(_cancellable):
    """And nats-py's errors are raised as the bus's own, naming the subject or stream."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, nats.errors.Error):
            raise _translation(error)(f"{self._name}: {error}") from error


def _translation(error: nats.errors.Error) -> type[BusError]:
    match error:
        case nats.errors.MaxPayloadError():
            return MessageTooLargeError
        case nats.errors.NoRespondersError():
            return NoResponderError
        case nats.errors.TimeoutError():
            return BusTimeoutError
        case _:
            return BusError


class _NatsDelivery:
    """A `Delivery` of a NATS message."""

    __slots__ = ("_bus", "_msg")

    def __init__(self, bus: NatsBus, msg: Msg) -> None:
        self._bus = bus
        self._msg = msg

    @property
    def size_bytes(self) -> int:
        return len(self._msg.data)

    @property
    def traceparent(self) -> str:
        headers = self._msg.headers
        return headers.get(TRACE_HEADER, "") if headers else ""

    def read(self, kind: type[M]) -> M:
        version = (self._msg.headers or {}).get(SCHEMA_HEADER, SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise MalformedMessageError(
                f"{kind.__name__}: schema {version!r}, this side reads {SCHEMA_VERSION!r}"
            )
        return kind.unpack(self._msg.data)

    async def reply(self, message: Message) -> None:
        body = message.pack()
        self._bus.check_size(f"the reply to {self._msg.subject}", len(body))
        await self._bus.reply_to(self._msg, body, {})

    async def refuse(self, refusal: RefusedError) -> None:
        headers = {ERROR_HEADER: str(refusal.code)}
        if refusal.retry_after_s is not None:
            headers[RETRY_HEADER] = str(refusal.retry_after_s)
        await self._bus.reply_to(self._msg, refusal.reason.encode(), headers)


def _refusal_in(body: bytes, headers: Mapping[str, str]) -> RefusedError:
    """The refusal that a reply carries."""
    wait_s = headers.get(RETRY_HEADER)
    retry_after_s = None if wait_s is None else float(wait_s)
    return RefusedError(body.decode(), code=int(headers[ERROR_HEADER]), retry_after_s=retry_after_s)


class _Subscription:
    """A `Subscription` whose end is not an error when it has ended before."""

    def __init__(self, subscription: NatsSubscription) -> None:
        self._subscription = subscription

    async def unsubscribe(self) -> None:
        with contextlib.suppress(nats.errors.BadSubscriptionError, nats.errors.ConnectionClosedError):
            await self._subscription.unsubscribe()


class _NatsStreamReader:
    """A pull consumer that follows the stream over reconnects.

    Each binding makes a consumer of its own, named `<reader>_<random>`, from the message after the
    last one taken: what the server had sent into a lost connection would otherwise come again only
    after ACK_WAIT_S. When the reader's consumer is gone, another reader has taken its place.
    """

    def __init__(
        self, client: Client, jetstream: JetStreamContext, stream: str, reader: str, after_sequence: int
    ) -> None:
        self._client = client
        self._jetstream = jetstream
        self._stream = stream
        self._reader = reader
        self._last_sequence = after_sequence

    @classmethod
    async def open(
        cls, client: Client, jetstream: JetStreamContext, stream: str, reader: str, after_sequence: int
    ) -> Self:
        self = cls(client, jetstream, stream, reader, after_sequence)
        for consumer in await jetstream.consumers_info(stream):
            if consumer.name.rpartition("_")[0] == reader:
                await self._delete(consumer.name)
        await self._bind()
        return self

    async def next(self, *, timeout_s: float) -> StreamMessage | None:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while (left_s := deadline_s - loop.time()) > 0:
            try:
                with _cancellable():
                    await self._rebind_if_stale()
                    # One at a time: of several, nats-py at times holds the first back until its timeout.
                    [msg] = await self._pull.fetch(1, timeout=min(left_s, FETCH_SLICE_S))
                return self._taken(msg)
            except TimeoutError:
                continue
            except nats.errors.Error as error:
                log.warning("reading %s: %s; trying again", self._stream, error)
                self._stale = True
                await asyncio.sleep(RETRY_S)
        return None

    async def close(self) -> None:
        with contextlib.suppress(nats.errors.Error):
            await self._pull.unsubscribe()

    async def _rebind_if_stale(self) -> None:
        if not self._stale and self._num_reconnects == self._client.stats["reconnects"]:
            return
        try:
            await self._jetstream.consumer_info(self._stream, self._consumer)
        except NotFoundError as error:
            raise BusError(f"another reader {self._reader!r} of {self._stream} has taken over") from error
        pull, consumer = self._pull, self._consumer
        await self._bind()
        await pull.unsubscribe()
        await self._delete(consumer)

    async def _bind(self) -> None:
        num_reconnects = self._client.stats["reconnects"]
        consumer = f"{self._reader}_{secrets.token_hex(8)}"
        config = ConsumerConfig(
            durable_name=consumer,
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=self._last_sequence + 1,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ACK_WAIT_S,
            max_ack_pending=MAX_ACK_PENDING,
        )
        await self._jetstream.add_consumer(self._stream, config)
        self._pull = await self._jetstream.pull_subscribe_bind(consumer, stream=self._stream)
        self._consumer, self._num_reconnects, self._stale = consumer, num_reconnects, False

    async def _delete(self, consumer: str) -> None:
        with contextlib.suppress(NotFoundError):
            await self._jetstream.delete_consumer(self._stream, consumer)

    def _taken(self, msg: Msg) -> StreamMessage:
        self._last_sequence = msg.metadata.sequence.stream

        async def ack() -> None:
            with _translated(self._stream), contextlib.suppress(nats.errors.MsgAlreadyAckdError):
                await msg.ack()

        return StreamMessage(self._last_sequence, msg.data, msg.headers or {}, ack)
