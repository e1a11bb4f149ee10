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
