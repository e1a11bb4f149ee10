"""The handling of an arrived message on every bus: read it, call its handler, guard the call."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeVar

from shared.bus.base import Handler, Incoming, Responder
from shared.errors import BusError, MalformedMessageError, RefusedError
from shared.messages.base import Message
from shared.subjects import RequestSubject, Subject

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)
T = TypeVar("T")

HEADERS_BYTES = 256
"""Room kept for headers below the size limit of a message."""
CLOSE_TIMEOUT_S = 1.0

log = logging.getLogger(__name__)


def stored_size_bytes(body: bytes, headers: dict[str, str]) -> int:
    """The size of a durable message with these headers, as it counts against the limit."""
    return len(body) + sum(len(key) + len(value) + len(": \r\n") for key, value in headers.items())


class Delivery(Protocol):
    """An arrived message, not yet read."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def traceparent(self) -> str: ...

    def read(self, kind: type[M]) -> M:
        """Raises MalformedMessageError."""
        ...

    async def reply(self, message: Message) -> None: ...

    async def refuse(self, refusal: RefusedError) -> None: ...


Receiver = Callable[[Delivery], Awaitable[None]]


class Failure:
    """The first error that made a bus fail, for whoever waits for it."""

    def __init__(self) -> None:
        self._happened = asyncio.Event()
        self._error: BaseException | None = None

    def set(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
            self._happened.set()

    async def wait(self) -> None:
        """Wait for the first error, then raise it."""
        await self._happened.wait()
        assert self._error is not None
        raise self._error


class Dispatcher:
    """Calls the handlers and responders of one service."""

    def __init__(self) -> None:
        self.failure = Failure()
        self.num_malformed = 0
        self._answering: set[asyncio.Task[None]] = set()

    def handling(self, subject: Subject[M], handler: Handler[M]) -> Receiver:
        """A receiver that calls `handler`; await it before giving it the next message."""

        async def receive(delivery: Delivery) -> None:
            try:
                message = delivery.read(subject.message)
            except MalformedMessageError as error:
                self._count_malformed(subject.name, delivery, error)
            else:
                await self.guard(subject.name, handler, Incoming(message, delivery.traceparent))

        return receive

    def answering(
        self, subject: RequestSubject[M, R], responder: Responder[M, R], *, max_running: int
    ) -> Receiver:
        """A receiver that answers in a task of its own, and waits while `max_running` run."""
        slots = asyncio.Semaphore(max_running)

        def done(task: asyncio.Task[None]) -> None:
            self._answering.discard(task)
            slots.release()

        async def receive(delivery: Delivery) -> None:
            await slots.acquire()
            answer = partial(self._answer, subject, responder)
            task = asyncio.get_running_loop().create_task(self.guard(subject.name, answer, delivery))
            self._answering.add(task)
            task.add_done_callback(done)

        return receive

    async def close(self) -> None:
        """Cancel the answers that still run; returns after CLOSE_TIMEOUT_S at most."""
        tasks = self._answering - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)

    async def _answer(
        self, subject: RequestSubject[M, R], responder: Responder[M, R], delivery: Delivery
    ) -> None:
        try:
            message = delivery.read(subject.message)
        except MalformedMessageError as error:
            self._count_malformed(subject.name, delivery, error)
            await delivery.refuse(RefusedError(str(error), code=400))
            return
        try:
            await delivery.reply(await responder(Incoming(message, delivery.traceparent)))
        except RefusedError as refusal:
            await delivery.refuse(refusal)
        except Exception as error:
            reason = f"the responder of {subject.name} failed: {type(error).__name__}"
            await delivery.refuse(RefusedError(reason, code=500))
            raise

    async def guard(self, name: str, work: Callable[[T], Awaitable[None]], argument: T) -> None:
        """Turn whatever `work(argument)` raises into the bus's failure; only a real cancellation passes.

        It is called here, not by the caller: a task cancelled before it began leaves no coroutine behind.
        """
        try:
            await work(argument)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Raised by the handler itself: escaping, it would end the subscription unnoticed.
            self.failure.set(BusError(f"the handler of {name} ended by a cancellation"))
        except Exception as error:  # noqa: BLE001 - handed to wait_failed, which raises it
            self.failure.set(error)

    def _count_malformed(self, name: str, delivery: Delivery, error: MalformedMessageError) -> None:
        self.num_malformed += 1
        log.warning("dropped a malformed message on %s (%d bytes): %s", name, delivery.size_bytes, error)
