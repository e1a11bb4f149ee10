"""Addresses of NATS as people write them."""

import pytest

from shared.addresses import NatsAddress, nats_address
from shared.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("nats://host:4333", NatsAddress(("nats://host:4333",))),
        ("nats://host", NatsAddress(("nats://host:4222",))),
        ("host", NatsAddress(("nats://host:4222",))),
        ("tls://[::1]", NatsAddress(("tls://[::1]:4222",))),
        ("nats://u:p%40ss@host:4222", NatsAddress(("nats://host:4222",), "u", "p@ss")),
        ("nats://to%2Fken@host", NatsAddress(("nats://host:4222",), "to/ken")),
        ("nats://a:4222,nats://b:4223", NatsAddress(("nats://a:4222", "nats://b:4223"))),
        ("nats://u:p@a, b", NatsAddress(("nats://a:4222", "nats://b:4222"), "u", "p")),
    ],
)
def test_what_people_write_is_understood(text: str, address: NatsAddress) -> None:
    assert nats_address(text) == address
    assert address.wants_tls == text.startswith("tls")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "''"),
        ("http://host", "'host'"),
        ("nats://u:secret@host:port", "'host:port'"),
        ("nats://u:secret@host:4222/path", "'host:4222'"),
        ("nats://u:secret@a,nats://v:secret@b", "different users"),
        ("nats://a,tls://b", "all tls://"),
    ],
)
def test_what_is_no_address_is_named_without_its_password(text: str, shown: str) -> None:
    with pytest.raises(ConfigurationError, match="LEMIX_NATS_URL") as refused:
        nats_address(text)
    assert shown in str(refused.value)
    assert "secret" not in str(refused.value)


def test_people_are_shown_no_password() -> None:
    assert str(nats_address("nats://u:secret@a,b:1")) == "a:4222, b:1"
