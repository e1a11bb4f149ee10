"""Who may reach a gateway without keys."""

import pytest

from services.gateway.access.exposure import check_exposure, is_known_host, is_loopback, is_own_origin
from shared.errors import ConfigurationError

LOOPBACK = ["127.0.0.1", "127.8.9.1", "::1", "localhost", "lemix.localhost"]
OTHERS = [
    "0.0.0.0",
    "::",
    "",
    "192.168.1.4",
    "fe80::1",
    "example.org",
    "localhost.example.org",
    "127.0.0.1.nip.io",
]


@pytest.mark.parametrize("host", LOOPBACK)
def test_this_machine_alone_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, has_keys=False, insecure=False)


@pytest.mark.parametrize("host", OTHERS)
def test_others_are_let_in_only_with_keys_or_when_it_is_said(host: str) -> None:
    assert not is_loopback(host)
    check_exposure(host, has_keys=True, insecure=False)
    check_exposure(host, has_keys=False, insecure=True)
    with pytest.raises(ConfigurationError, match="--insecure"):
        check_exposure(host, has_keys=False, insecure=False)


@pytest.mark.parametrize(
    "authority", ["127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "LocalHost:1", "GPU.example:80"]
)
def test_a_host_that_names_this_machine(authority: str) -> None:
    assert is_known_host(authority, ("gpu.example",))


@pytest.mark.parametrize(
    "authority",
    ["evil.example", "evil.example:8000", "127.0.0.1@evil.example", "[::1", "", "127.0.0.1.evil.example"],
)
def test_a_host_that_does_not(authority: str) -> None:
    assert not is_known_host(authority, ("gpu.example",))


@pytest.mark.parametrize(
    ("origin", "is_own"),
    [
        ("http://127.0.0.1:8000", True),
        ("https://127.0.0.1:8000", True),
        ("https://chat.example", True),
        ("http://127.0.0.1:8001", False),
        ("http://chat.example", False),
        ("https://evil.example", False),
        ("null", False),
    ],
)
def test_origins(origin: str, is_own: bool) -> None:
    assert is_own_origin(origin, "127.0.0.1:8000", ("https://chat.example",)) == is_own


def test_trusted_names_are_names_however_they_are_written() -> None:
    assert is_known_host("gpu.example:8000", ["GPU.Example"])
    assert is_known_host("GPU.Example", ["gpu.example"])
    assert not is_known_host("gpu.example.evil", ["GPU.Example"])
