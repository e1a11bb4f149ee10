"""Finding a port for the API."""

import socket

from shared.errors import ConfigurationError


def claim_port(host: str, port: int) -> int:
    """`port` when it can be listened on, or a free one for 0.

    Raises ConfigurationError when `port` is taken or the host is not this machine's.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port}: {error.strerror}; try another --port"
            ) from error
        free: int = probe.getsockname()[1]
        return free
