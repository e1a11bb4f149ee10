"""uvicorn inside our own event loop: our signals, our end."""

import asyncio
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.settings import GatewaySettings
from shared.addresses import authority
from shared.errors import ConfigurationError

MAX_HEADER_BYTES = 1 << 18
"""Most bytes around one request: its headers, what is written between the parts of its body, and trailers."""

_GRACE_S = 1
_OPEN_FILES = 65_536
"""Enough for any load of one process; the usual limit is 1,024."""


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the service's lifecycle."""
        yield


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's reader of requests, with a bound on headers: its parser keeps them however long they are."""

    _num_unread_bytes = 0
    """Bytes since the parser last came to the end of headers or gave out a piece of a body."""

    def data_received(self, data: bytes) -> None:
        self._num_unread_bytes += len(data)
        super().data_received(data)
        if self._num_unread_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"more than {MAX_HEADER_BYTES} bytes of headers")

    def on_headers_complete(self) -> None:
        self._num_unread_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_unread_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_unread_bytes = 0
        super().on_message_complete()


def allow_many_connections() -> None:
    """Raise this process's limit of open files, and so of connections, where it is low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _OPEN_FILES if hard == unlimited else min(_OPEN_FILES, hard)
    if soft != unlimited and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; that of `::` listens on IPv4 too.

    Raises ConfigurationError naming the address when it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    is_dual = host == "::" and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=is_dual)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {authority(host, port)}: {error.strerror}") from error
    # Connections inherit it. uvloop sets it too, asyncio's own loop does not: 40 ms for each answer.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def server_config(app: ASGIApp, settings: GatewaySettings) -> uvicorn.Config:
    """How uvicorn is told to serve. Raises ConfigurationError when the certificate cannot be used."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        http=BoundedProtocol,
        ws="none",
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=_GRACE_S,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    try:
        config.load()
    except OSError as error:
        raise ConfigurationError(
            f"LEMIX_TLS_CERTIFICATE, LEMIX_TLS_KEY: cannot use {settings.tls_certificate} "
            f"with {settings.tls_key}: {error}"
        ) from error
    return config


async def serve(config: uvicorn.Config, listener: socket.socket, *, before_end: Callable[[], None]) -> None:
    """Serve until cancelled; then call `before_end` and leave open requests a second to finish."""
    server = _Server(config)
    # Not in a TaskGroup: that would cancel the server instead of letting it finish.
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(serving)
    finally:
        before_end()
        server.should_exit = True
        await serving
