"""How errors from behind the gateway are told."""

from typing import Any

import pytest

from services.gateway.http.errors import ApiError, as_api_error
from shared.errors import BusTimeoutError, MessageTooLargeError, NoResponderError, RefusedError


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RefusedError("full", code=429), 429),
        (NoResponderError("x"), 503),
        (BusTimeoutError("x"), 503),
        (MessageTooLargeError("x"), 413),
        (ApiError(418, "x"), 418),
    ],
)
def test_errors_of_the_cluster_have_a_status(error: Any, status: int) -> None:
    told = as_api_error(error)
    assert told.status == status
    assert ("retry-after" in told.headers) == (status in (429, 503))


@pytest.mark.parametrize("code", [429, 503])
@pytest.mark.parametrize(
    ("retry_after_s", "seconds", "milliseconds"),
    [(0.0, "1", "500"), (0.75, "1", "750"), (2.0001, "3", "2001"), (120.0, "120", "120000")],
)
def test_the_time_of_a_refusal_is_rounded_up(
    code: int, retry_after_s: float, seconds: str, milliseconds: str
) -> None:
    told = as_api_error(RefusedError("late", code=code, retry_after_s=retry_after_s))
    assert (told.headers["retry-after"], told.headers["retry-after-ms"]) == (seconds, milliseconds)


def test_a_refusal_for_now_has_the_body_of_a_rate_limit() -> None:
    told = as_api_error(RefusedError("the first token would come after 3 s, not within 1 s", code=429))
    assert told.body()["error"] == {
        "message": "the first token would come after 3 s, not within 1 s",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
