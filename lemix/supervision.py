"""One service's process: started, logged, stopped; and how often it may be started again."""

import asyncio
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from lemix.topology import ServiceSpec
from shared.errors import LemixError

PR_SET_PDEATHSIG = 1
LAST_LINES = 12


class ClusterFailedError(LemixError):
    """The cluster could not start, or lost a service for good; the message says which and why."""


class RestartBudget:
    """At most `max_restarts` within any `window_s` seconds."""

    def __init__(self, *, max_restarts: int = 3, window_s: float = 60.0) -> None:
        self.max_restarts = max_restarts
        self.window_s = window_s
        self._restarts_s: deque[float] = deque()

    def take(self, now_s: float) -> bool:
        """Whether one more restart is allowed now; if so, it is counted."""
        while self._restarts_s and now_s - self._restarts_s[0] > self.window_s:
            self._restarts_s.popleft()
        if len(self._restarts_s) >= self.max_restarts:
            return False
        self._restarts_s.append(now_s)
        return True

    def __str__(self) -> str:
        return f"{self.max_restarts} restarts within {self.window_s:.0f} s"


class Supervised(Protocol):
    """A process that is started again when it ends."""

    @property
    def name(self) -> str: ...

    @property
    def log(self) -> Path: ...

    async def start(self) -> None:
        """Raises LemixError when it cannot be started."""
        ...

    async def wait(self) -> int:
        """Wait for its end; returns the exit status (negative: the signal)."""
        ...


class ServiceProcess:
    """The process of one service; both its outputs go to one log file."""

    def __init__(self, spec: ServiceSpec, log: Path) -> None:
        self._spec = spec
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        log.write_bytes(b"")

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def log(self) -> Path:
        return self._log

    @property
    def pid(self) -> int | None:
        """The id of the newest process; None before the first start."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start it in a session of its own, so that a terminal's Ctrl-C reaches only the launcher.

        Raises ClusterFailedError when the command cannot be run.
        """
        try:
            with self.log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._spec.command,
                    env=dict(self._spec.environment),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=_die_with(os.getpid()),
                )
        except OSError as error:
            raise ClusterFailedError(f"cannot start {self.name}: {error}") from error

    async def wait(self) -> int:
        assert self._process is not None, f"{self.name} was never started"
        return await self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal unless the process has ended."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)


def last_lines(log: Path) -> list[str]:
    """The end of a log, for a person to read; nothing of one that was never written."""
    return log.read_text(errors="replace").splitlines()[-LAST_LINES:] if log.exists() else []


async def stop_all(processes: list[ServiceProcess], *, grace_s: float) -> list[str]:
    """Ask all to end, kill after `grace_s` who has not; returns the names of those killed."""
    started = [process for process in processes if process.pid is not None]
    for process in started:
        process.send(signal.SIGTERM)
    waits = {asyncio.create_task(process.wait()): process for process in started}
    if not waits:
        return []
    _, pending = await asyncio.wait(waits, timeout=grace_s)
    for task in pending:
        waits[task].send(signal.SIGKILL)
    if pending:
        await asyncio.wait(pending)
    return [waits[task].name for task in pending]


def _die_with(launcher_pid: int) -> Callable[[], None] | None:
    """The call that a child makes first: the kernel then kills it when the launcher dies (Linux only).

    SIGKILL, because a launcher that is gone can no longer follow up on a child that ignores SIGTERM.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def bind() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher_pid:  # it died before the kernel was told
            os._exit(1)

    return bind
