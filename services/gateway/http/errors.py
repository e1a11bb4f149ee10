"""The answer to a request that cannot be answered."""

from collections.abc import Mapping
from math import ceil
from typing import Literal

from pydantic import BaseModel

from shared.errors import LemixError, MessageTooLargeError, NoResponderError, RefusedError

_USUAL_HEADERS: Mapping[int, dict[str, str]] = {
    408: {"connection": "close"},  # the rest of the body may never come
    415: {"accept-encoding": "gzip, zstd"},
    429: {"retry-after": "1"},
    503: {"retry-after": "1"},
}


SOONEST_RETRY_S = 0.5
"""Nobody is told to come again sooner: a refusal costs the gateway nearly as much as an answer."""
RefusedFor = Literal["invalid", "key", "gateway", "cluster"]
"""The cause of a refusal: what the request says, its key's limits, or what gateway or cluster can do now."""


class ApiError(LemixError):
    """An answer that is an error, as OpenAI's API words it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        refused_for: RefusedFor = "invalid",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = _USUAL_HEADERS.get(status, {}) | dict(headers or {})
        """HTTP headers of the answer."""
        self.refused_for = refused_for

    def body(self) -> dict[str, dict[str, str | None]]:
        """The answer's JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def rate_limited(
    message: str, *, refused_for: RefusedFor = "gateway", retry_after_s: float | None = None
) -> ApiError:
    """The error to raise for a request that is one too many; None: when to ask again, nobody knows."""
    headers = _retry_headers(retry_after_s)
    return ApiError(429, message, code="rate_limit_exceeded", headers=headers, refused_for=refused_for)


def _retry_headers(retry_after_s: float | None) -> dict[str, str]:
    """The headers that say when to ask again: in whole seconds, and as OpenAI's clients prefer it."""
    if retry_after_s is None:
        return {}
    wait_s = max(retry_after_s, SOONEST_RETRY_S)
    return {"retry-after": str(ceil(wait_s)), "retry-after-ms": str(ceil(wait_s * 1000))}


class ErrorDetail(BaseModel):
    """The fault, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    """The parameter that is wrong."""
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class ClientGoneError(LemixError):
    """The client closed its connection before it had its answer."""


def as_api_error(error: LemixError) -> ApiError:
    """How an error from behind the gateway is told to a client."""
    match error:
        case ApiError():
            return error
        case RefusedError(code=429):
            return rate_limited(error.reason, refused_for="cluster", retry_after_s=error.retry_after_s)
        case RefusedError():
            return ApiError(error.code, error.reason, headers=_retry_headers(error.retry_after_s))
        case NoResponderError():
            return ApiError(503, "no scheduler is running")
        case MessageTooLargeError():
            return ApiError(413, f"the request is larger than the bus carries: {error}")
        case _:
            return ApiError(503, f"the cluster did not answer: {error}")
