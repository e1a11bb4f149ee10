"""A completion as server-sent events, and the watch for a client that goes away."""

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.http.errors import ApiError, ClientGoneError
from services.gateway.openai.answers import VERSION_HEADER, EventEncoder, error_event
from services.gateway.openai.completions import Completion
from services.gateway.settings import GatewaySettings
from services.gateway.text.detokenise import Piece

Pieces = list[tuple[int, Piece]]

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_PING = b": ping\n\n"
"""A comment, which clients skip: it tells proxies and clients that the stream is alive."""


async def watch(receive: Receive, completion: Completion) -> None:
    """Fail the completion when its client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    completion.fail(ClientGoneError("the client closed its connection"))


class EventStream(Response):
    """Sends the pieces of a completion as they come, and closes it."""

    def __init__(
        self,
        completion: Completion,
        first: Pieces,
        *,
        watcher: asyncio.Task[None],
        settings: GatewaySettings,
    ) -> None:
        """`first` is what there is already.

        A client that does not read is given up after `settings.request_timeout_s`.
        """
        super().__init__()
        self._completion = completion
        self._first = first
        self._watcher = watcher
        self._timeout_s = settings.request_timeout_s
        self._ping_every_s = settings.ping_every_s
        self._encoder = EventEncoder(
            completion.heading,
            include_usage=completion.request.include_usage,
            with_logprobs=completion.request.logprobs is not None,
        )

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
            self._completion.close()
            self._watcher.cancel()

    def _response_headers(self) -> list[tuple[bytes, bytes]]:
        versions = self._completion.versions
        if versions is None:
            return _HEADERS
        return [*_HEADERS, (VERSION_HEADER.encode(), str(versions[0]).encode())]

    async def _send_events(self, send: Send) -> bytes:
        """Send all but the last event, which is returned."""
        completion, pieces = self._completion, self._first
        try:
            while True:
                if body := self._encode(pieces):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                if completion.finished:
                    return self._encoder.ending(completion.versions, completion.usage)
                pieces = await self._next(send)
        except ApiError as error:
            return error_event(error)

    async def _next(self, send: Send) -> Pieces:
        """The next pieces; sends a comment whenever they let the client wait for long."""
        while True:
            try:
                async with asyncio.timeout(self._ping_every_s):
                    return await self._completion.next()
            except TimeoutError:
                await send({"type": "http.response.body", "body": _PING, "more_body": True})

    def _encode(self, pieces: Pieces) -> bytes:
        versions = self._completion.versions
        return b"".join(self._encoder.chunk(index, piece, versions) for index, piece in pieces)
