"""Addresses of the API."""

import socket

import pytest

from lemix.ports import api_url_of, claim_port
from shared.errors import ConfigurationError


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("::", "http://[::1]:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("gpu.example", "http://gpu.example:8000"),
    ],
)
def test_the_api_is_reached_from_this_machine(host: str, url: str) -> None:
    assert api_url_of(host, 8000, has_tls=False) == url


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::", "0.0.0.0"])
def test_a_port_is_claimed_on_addresses_of_both_kinds(host: str) -> None:
    assert claim_port(host, 0) > 0


def test_a_taken_port_of_an_ipv6_address_is_named() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"\[::1\]:{port}"):
            claim_port("::1", port)
