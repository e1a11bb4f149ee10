"""Addresses as people and URLs write them."""

from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from shared.errors import ConfigurationError

NATS_PORT = 4222
TLS_SCHEME = "tls"


def authority(host: str, port: int) -> str:
    """`host:port`; an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class NatsAddress:
    """Where NATS servers of one cluster are, and as whom to connect."""

    servers: tuple[str, ...]
    """URLs with a port and without a user: `nats://host:4222`."""
    user: str | None = None
    """Without a password: a token."""
    password: str | None = None

    @property
    def wants_tls(self) -> bool:
        return self.servers[0].startswith(f"{TLS_SCHEME}://")

    def __str__(self) -> str:
        """For people: no secrets."""
        return ", ".join(server.partition("://")[2] for server in self.servers)


def nats_address(text: str) -> NatsAddress:
    """Read `nats://user:p%40ss@host:port`, or several with commas between them; the default port is 4222.

    Users and passwords are percent-encoded. Those of one address hold for all; `tls://` must be said of all.
    Raises ConfigurationError, which does not show the password.
    """
    parts = [_split_url(part.strip()) for part in text.split(",")]
    users = {(part.username, part.password) for part in parts if part.username is not None}
    if len(users) > 1:
        raise ConfigurationError("LEMIX_NATS_URL: its servers have different users")
    if len({part.scheme for part in parts}) > 1:
        raise ConfigurationError("LEMIX_NATS_URL: all of its servers must have nats://, or all tls://")
    servers = tuple(
        f"{part.scheme}://{authority(part.hostname or '', part.port or NATS_PORT)}" for part in parts
    )
    user, password = users.pop() if users else (None, None)
    return NatsAddress(
        servers, None if user is None else unquote(user), None if password is None else unquote(password)
    )


def _split_url(text: str) -> SplitResult:
    url = urlsplit(text if "://" in text else f"nats://{text}")
    try:
        is_good = url.scheme in ("nats", TLS_SCHEME) and bool(url.hostname) and url.port != 0
    except ValueError:  # of the port
        is_good = False
    if not is_good or url.path.strip("/") or url.query or url.fragment:
        shown = url.netloc.rpartition("@")[2] or text
        raise ConfigurationError(f"LEMIX_NATS_URL: {shown!r} is no nats://host:port or tls://host:port")
    return url
