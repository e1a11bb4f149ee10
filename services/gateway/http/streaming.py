"""A generation as an HTTP response, whole or as server-sent events, watched for a client that goes away."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.context import GatewayContext
from services.gateway.generation import Generation, Usage, Versions
from services.gateway.http.errors import ApiError, ClientGoneError
from services.gateway.settings import GatewaySettings
from services.gateway.text.detokenise import Piece

Pieces = list[tuple[int, Piece]]

VERSION_HEADER = "lemix-weights-version"
"""The versions of the first and the last token, as `3-5`; a stream only knows the first one."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_PING = b": ping\n\n"
"""A comment, which clients skip: it tells proxies and clients that the stream is alive."""


class EventEncoder(Protocol):
    """Writes the events of one route's streams; where there is nothing to tell, no bytes."""

    def opening(self, versions: Versions | None) -> bytes:
        """Before the first piece."""
        ...

    def piece(self, index: int, piece: Piece, versions: Versions | None) -> bytes:
        """The event that one sequence adds."""
        ...

    def ending(self, versions: Versions | None, usage: Usage) -> bytes:
        """After the last piece of a complete answer."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """Instead of the rest of the answer."""
        ...


async def whole(request: Request, context: GatewayContext, generation: Generation) -> list[list[Piece]]:
    """All pieces, sequence by sequence. Raises what `Generation.next` raises."""
    watcher = context.cluster.spawn(_watch(request.receive, generation))
    try:
        return await generation.rest()
    finally:
        generation.close()
        watcher.cancel()


async def stream(
    request: Request, context: GatewayContext, generation: Generation, events: EventEncoder
) -> Response:
    """A stream once the nodes have taken the generation: until then errors have a status.

    Raises what `Generation.next` raises.
    """
    watcher = context.cluster.spawn(_watch(request.receive, generation))
    try:
        first = await generation.first()
    except BaseException:
        generation.close()
        watcher.cancel()
        raise
    return _EventStream(generation, first, events, watcher=watcher, settings=context.settings)


def version_header(generation: Generation) -> dict[str, str]:
    """The header of a whole answer."""
    assert generation.versions is not None, "a whole answer has been computed"
    first, last = generation.versions
    return {VERSION_HEADER: f"{first}-{last}"}


async def _watch(receive: Receive, generation: Generation) -> None:
    """Fail the generation when its client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.fail(ClientGoneError("the client closed its connection"))


class _Silence:
    """Wakes a stream that has sent nothing for `limit_s`.

    One timer for the stream, which looks again later when something was sent: one for each token would cost
    as much as the token's text.
    """

    def __init__(self, limit_s: float, wake: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit_s = limit_s
        self._wake = wake
        self.broken()
        self._timer = self._loop.call_at(self._ends_s, self._look)

    def broken(self) -> None:
        """Something was sent."""
        self._ends_s = self._loop.time() + self._limit_s

    @property
    def is_too_long(self) -> bool:
        return self._loop.time() >= self._ends_s

    def end(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        if self.is_too_long:
            self._wake()
        again_s = self._loop.time() + self._limit_s if self.is_too_long else self._ends_s
        self._timer = self._loop.call_at(again_s, self._look)


class _EventStream(Response):
    """Sends the pieces of a generation as they come, and closes it."""

    def __init__(
        self,
        generation: Generation,
        first: Pieces,
        events: EventEncoder,
        *,
        watcher: asyncio.Task[None],
        settings: GatewaySettings,
    ) -> None:
        """`first` is what there is already.

        A client that does not read is given up after `settings.request_timeout_s`.
        """
        super().__init__()
        self._generation = generation
        self._first = first
        self._events = events
        self._watcher = watcher
        self._timeout_s = settings.request_timeout_s
        self._ping_every_s = settings.ping_every_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await send(
                    {"type": "http.response.start", "status": 200, "headers": self._response_headers()}
                )
                await send({"type": "http.response.body", "body": await self._send_events(send)})
        except (TimeoutError, ClientGoneError):
            return  # nobody reads: the response stays without its end
        finally:
            self._generation.close()
            self._watcher.cancel()

    def _response_headers(self) -> list[tuple[bytes, bytes]]:
        versions = self._generation.versions
        if versions is None:
            return _HEADERS
        return [*_HEADERS, (VERSION_HEADER.encode(), str(versions.first).encode())]

    async def _send_events(self, send: Send) -> bytes:
        """Send all but the last event, which is returned."""
        generation = self._generation
        silence = _Silence(self._ping_every_s, generation.wake)
        body = self._events.opening(generation.versions) + self._encode(self._first)
        try:
            while True:
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    silence.broken()
                if generation.finished:
                    return self._events.ending(generation.versions, generation.usage)
                body = self._encode(await generation.next())
                if not body and silence.is_too_long:
                    body = _PING
        except ApiError as error:
            return self._events.failure(error)
        finally:
            silence.end()

    def _encode(self, pieces: Pieces) -> bytes:
        versions = self._generation.versions
        return b"".join(self._events.piece(index, piece, versions) for index, piece in pieces)
