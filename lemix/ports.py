"""Finding a port for the API, and its address as this machine reaches it."""

import socket
import ssl
from pathlib import Path

from shared.addresses import authority
from shared.errors import ConfigurationError

_LOOPBACKS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where an address that stands for all of a machine's is reached from the machine itself."""


def api_url_of(host: str, port: int, *, has_tls: bool) -> str:
    """The API's URL, for programs of this machine."""
    return f"{'https' if has_tls else 'http'}://{authority(_LOOPBACKS.get(host, host), port)}"


def trusting(certificate: Path) -> ssl.SSLContext:
    """TLS with whoever has this certificate, by whatever name. Raises ConfigurationError."""
    try:
        context = ssl.create_default_context(cafile=certificate)
    except OSError as error:
        raise ConfigurationError(f"LEMIX_TLS_CERTIFICATE: cannot use {certificate}: {error}") from error
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def claim_port(host: str, port: int, *, option: str = "--port") -> int:
    """`port` when it can be listened on, or a free one for 0; `option` is how a person chooses it.

    Raises ConfigurationError when `port` is taken or the host is not this machine's.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {authority(host, port)}: {error.strerror}; try another {option}"
            ) from error
        free: int = probe.getsockname()[1]
        return free
