"""Reads the body of each request before its route runs: counted, within a bound and a deadline, decoded."""

import asyncio

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.http.auth import caller_of
from services.gateway.http.bodies import bounded_stream, is_json, is_upload
from services.gateway.http.content_encoding import decode
from services.gateway.http.errors import ApiError, rate_limited
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings

_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS", "DELETE")
_UTF8_MARK = b"\xef\xbb\xbf"


class BodyReader:
    """A middleware. Routes find the whole body there; an upload they read themselves, as it comes.

    A request counts as running from the first byte of its body to the last one of its answer.
    """

    def __init__(self, app: ASGIApp, *, settings: GatewaySettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._num_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _WITHOUT_BODY:
            await self._app(scope, receive, send)
            return
        self._num_running += 1
        try:
            await self._app(scope, await self._with_body(scope, receive), send)
        finally:
            self._num_running -= 1

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """The callable that the route receives from. Raises ApiError, ClientGoneError."""
        try:
            if self._num_running > self._settings.max_concurrent_requests:
                raise rate_limited("too many requests at once")
            if not is_upload(Headers(scope=scope)):
                return _replay(await self._read(Request(scope, receive)), receive)
            _refuse_encoded_upload(Headers(scope=scope))
        except ApiError as error:
            self._metrics.refused(error.refused_for, caller_of(Request(scope)).service_class)
            raise
        return receive

    async def _read(self, request: Request) -> bytes:
        """The decoded JSON. Raises ApiError, ClientGoneError."""
        limit, timeout_s = self._settings.max_body_bytes, self._settings.body_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                raw = b"".join([part async for part in bounded_stream(request, limit)])
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {timeout_s:g} s") from error
        if raw and not is_json(request.headers):
            raise ApiError(415, "expected a body of type application/json")
        body = decode(raw, request.headers.get("content-encoding", ""), max_bytes=limit)
        return body.removeprefix(_UTF8_MARK)


def _refuse_encoded_upload(headers: Headers) -> None:
    if encoding := headers.get("content-encoding"):
        raise ApiError(415, f"an upload cannot have the content encoding {encoding!r}")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, and then whatever comes after it."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return unread.pop() if unread else await receive()

    return next_message
