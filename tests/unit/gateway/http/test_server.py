"""How the gateway listens, and how long it keeps connections."""

import asyncio
import socket

import httpx
import pytest
from uvicorn.server import ServerState

from lemix.simulation.loop import run_virtual
from services.gateway.http.server import MAX_HEADER_BYTES, BoundedProtocol, listen, server_config
from services.gateway.settings import GatewaySettings
from shared.errors import ConfigurationError
from tests.support.gateway import gateway_world, served

HEAD = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"


def test_taken_address_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1:{port}"):
            listen("127.0.0.1", port)


def test_answers_are_sent_at_once() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_an_idle_connection_is_kept_longer_than_clients_and_proxies_keep_theirs() -> None:
    async with gateway_world() as world:
        config = server_config(world.app, GatewaySettings.given())
    assert config.timeout_keep_alive > 600  # the longest of the usual load balancers; httpx: 5 s, nginx: 75 s


class Wire(asyncio.Transport):
    """A client's connection, as the server sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("pause_s", "times", "is_kept"), [(5.0, 200, True), (80.0, 3, True), (610.0, 2, True), (630.0, 1, False)]
)
def test_a_connection_is_used_again_after_a_pause(pause_s: float, times: int, is_kept: bool) -> None:
    async def asked() -> None:
        async with gateway_world(deadline_s=1e6) as world:
            connection = BoundedProtocol(server_config(world.app, world.settings), ServerState(), {})
            connection.connection_made(wire)
            for _ in range(times):
                connection.data_received(HEAD + b"\r\n")
                await asyncio.sleep(pause_s)
            assert wire.closed != is_kept
            connection.connection_lost(None)

    wire = Wire()
    run_virtual(asked())
    assert wire.written.count(b"HTTP/1.1 200 OK\r\n") == times


@pytest.mark.parametrize(("host", "asked"), [("::1", "[::1]"), ("::", "[::1]"), ("::", "127.0.0.1")])
async def test_ipv6_addresses_are_served(host: str, asked: str) -> None:
    async with gateway_world() as world, served(world, host) as address:
        port = address.rpartition(":")[2]
        async with httpx.AsyncClient() as http:
            response = await http.get(f"http://{asked}:{port}/v1/models")
    assert response.status_code == 200


CHUNKED = b"PUT /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("begin", "more"),
    [(HEAD, b"X: y\r\n"), (HEAD + b"X: ", b"y"), (CHUNKED + b"0\r\nX: ", b"y"), (CHUNKED + b"1;x=", b"y")],
)
async def test_headers_without_end_close_the_connection(begin: bytes, more: bytes) -> None:
    part = more * 10_000
    async with gateway_world() as world, served(world) as address:
        _, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        writer.write(begin)
        with pytest.raises(ConnectionError):
            for _ in range(100 * MAX_HEADER_BYTES // len(part)):  # more than the sockets hold
                writer.write(part)
                await writer.drain()
        writer.close()


async def test_long_headers_within_the_bound_are_read() -> None:
    async with gateway_world() as world, served(world) as address, httpx.AsyncClient() as http:
        headers = {"x-long": "y" * (MAX_HEADER_BYTES // 2)}
        for _ in range(3):
            response = await http.get(f"{address}/v1/models", headers=headers)
            assert response.status_code == 200
