"""The log of each request: its id, its span, its line in the log, and how it failed.

The id goes with the answer (`X-Request-Id`), with every line that is logged meanwhile, and with the span.
"""

import logging
import re
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any
from urllib.parse import quote

from opentelemetry.trace import Span, SpanKind, StatusCode
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.http.bodies import error_response
from services.gateway.http.errors import ApiError, ClientGoneError
from shared.clock import IdSource
from shared.telemetry import Telemetry, traceparent_of

REQUEST_ID_HEADER = "x-request-id"
ANSWER_HEADERS = "answer_headers"
"""Where the state of a request may have a function that gives further headers of its answer."""
CLIENT_GONE = 499
"""nginx's status for a client that left; only logs and spans ever see it."""
_FAILED = ApiError(500, "the gateway failed; its log says why")
_SANE_ID = re.compile(r"[!-~]{1,128}")
_current_id: ContextVar[str] = ContextVar("request_id", default="")

log = logging.getLogger(__name__)


class RequestLog:
    """A middleware around all that can refuse or fail: it answers with the error that comes out."""

    def __init__(self, app: ASGIApp, *, ids: IdSource, telemetry: Telemetry) -> None:
        self._app = app
        self._ids = ids
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        request_id = self._id_of(headers.get(REQUEST_ID_HEADER, ""))
        _current_id.set(request_id)
        span = self._start_span(scope["method"], scope["path"], request_id, headers)
        answer = _Answer(send, request_id, scope.setdefault("state", {}))
        path = quote(scope["path"])  # one line of the log, whatever it is
        try:
            await self._app(scope, receive, answer.send)
        except ClientGoneError:
            answer.status = CLIENT_GONE
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("%s %s failed", scope["method"], path)
            if answer.status is not None:  # too late for another answer: the server cuts the connection
                raise
            refusal = error if isinstance(error, ApiError) else _FAILED
            await error_response(refusal)(scope, receive, answer.send)
        finally:
            log.info("%s %s: %s", scope["method"], path, answer.status)
            _end_span(span, answer.status)

    def _id_of(self, asked: str) -> str:
        return asked if _SANE_ID.fullmatch(asked) else self._ids.new("req")

    def _start_span(self, method: str, path: str, request_id: str, headers: MutableHeaders) -> Span | None:
        """The request's span, which becomes the parent of all that is done for it.

        Questions about how things stand (GET) come every second for ever, and have none.
        """
        if method in ("GET", "HEAD", "OPTIONS"):
            return None
        span = self._telemetry.span(
            "gateway.request",
            traceparent=headers.get("traceparent", ""),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": method,
                "url.path": path,
                "lemix.request_id": request_id,
            },
        )
        headers["traceparent"] = traceparent_of(span)
        return span


class _Answer:
    """Passes an answer on, be it an error, with the request's id among its headers."""

    def __init__(self, send: Send, request_id: str, state: Mapping[str, Any]) -> None:
        self._send = send
        self._request_id = request_id
        self._state = state
        self.status: int | None = None
        """None until the answer begins."""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            further = self._state[ANSWER_HEADERS]() if ANSWER_HEADERS in self._state else {}
            MutableHeaders(scope=message).update({REQUEST_ID_HEADER: self._request_id, **further})
        await self._send(message)


def _end_span(span: Span | None, status: int | None) -> None:
    if span is None:
        return
    if status is not None:
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(StatusCode.ERROR)
    span.end()


def show_request_ids() -> None:
    """Let this process's log lines begin with the id of the request at work."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(_WithRequestId())


class _WithRequestId(logging.Filter):
    """Puts the id of the request at work before each line."""

    def filter(self, record: logging.LogRecord) -> bool:
        if request_id := _current_id.get():
            record.msg = f"[{request_id.replace('%', '%%')}] {record.msg}"
        return True
