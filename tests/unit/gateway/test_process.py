"""The gateway as a process: how it says that it cannot start."""

import pytest

from services.gateway.http.server import listen
from shared.errors import ConfigurationError


def test_taken_address_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1:{port}"):
            listen("127.0.0.1", port)
