"""Who could reach a gateway that asks for no key, and who may: this machine's own programs only."""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from shared.errors import ConfigurationError


def is_loopback(host: str) -> bool:
    """Whether an address or a name is this machine to itself."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, *, has_keys: bool, insecure: bool) -> None:
    """Refuse an address that others reach, when anyone could use it. Raises ConfigurationError."""
    if not (has_keys or insecure or is_loopback(host)):
        raise ConfigurationError(
            f"without keys, {host!r} would let anyone who reaches it use and train the model: make a key "
            "(lemix keys create), listen on 127.0.0.1, or say --insecure (LEMIX_INSECURE=yes)"
        )


def is_known_host(authority: str, trusted: Collection[str]) -> bool:
    """Whether a request's `Host` is this machine to itself, or one of the `trusted` names.

    A page can make a name of its own site point here (DNS rebinding); its requests still carry that name.
    """
    try:
        name = urlsplit(f"//{authority}").hostname or ""
    except ValueError:  # no address at all
        return False
    return is_loopback(name) or name in map(str.lower, trusted)


def is_own_origin(origin: str, authority: str, named: Collection[str]) -> bool:
    """Whether a request's `Origin` is this gateway's own pages or one of the `named`."""
    return origin in named or origin in (f"http://{authority}", f"https://{authority}")
