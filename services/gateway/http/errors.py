"""What a client is told when its request cannot be answered."""

from shared.errors import LemixError, MessageTooLargeError, NoResponderError, RefusedError


class ApiError(LemixError):
    """An answer that is an error, as OpenAI's API words it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of the answer: when to try again, what to send instead, whether to go on at all."""
        match self.status:
            case 429 | 503:
                return {"retry-after": "1"}
            case 415:
                return {"accept-encoding": "gzip, zstd"}
            case 408:  # the rest of the body may never come
                return {"connection": "close"}
            case _:
                return {}

    def body(self) -> dict[str, dict[str, str | None]]:
        """The answer's JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientGoneError(LemixError):
    """The client closed its connection before it had its answer."""


def as_api_error(error: LemixError) -> ApiError:
    """How an error from behind the gateway is told to a client."""
    match error:
        case ApiError():
            return error
        case RefusedError():
            return ApiError(error.code, error.reason)
        case NoResponderError():
            return ApiError(503, "no scheduler is running")
        case MessageTooLargeError():
            return ApiError(413, f"the request is larger than the bus carries: {error}")
        case _:
            return ApiError(503, f"the cluster did not answer: {error}")
