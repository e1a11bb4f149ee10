"""The gateway as a process: what it loads, and how it says that it cannot start."""

import subprocess
import sys

import pytest

from services.gateway.server import listen
from shared.errors import ConfigurationError


def test_gateway_never_loads_torch() -> None:
    program = "import sys, services.gateway.__main__; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_taken_address_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1:{port}"):
            listen("127.0.0.1", port)
