"""A whole LeMix on this machine: NATS, scheduler, gateway, trainer, and the stages of every node.

NatsServer         the bus, unless a running one is given; it knows a user for each role
ServiceProcess     one for each service; a dead one is started again, within a budget
ArenaFolder        where the stages of this run keep their shared memory
RunFolder          logs, cluster.json, and the lock that keeps two launchers apart
"""

import asyncio
import os
import ssl
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from lemix.arenas import ArenaFolder, default_base, remove_abandoned
from lemix.devices import num_cpu_cores
from lemix.health import HealthProbe
from lemix.nats_server import LOOPBACK, NatsServer
from lemix.nats_users import make_users
from lemix.ports import api_url_of, claim_port, trusting
from lemix.run_folder import ClusterFile, RunFolder
from lemix.status import require_unused
from lemix.supervision import (
    ClusterFailedError,
    RestartBudget,
    ServiceProcess,
    Supervised,
    last_lines,
    stop_all,
)
from lemix.topology import ClusterOptions, CommandOf, ServiceSpec, module_command, service_specs
from services.gateway.access.exposure import check_exposure
from services.gateway.access.key_file import read_keys
from services.gateway.settings import KEYS_FILE, GatewaySettings
from shared.clock import Clock, SystemClock
from shared.errors import LemixError
from shared.settings import LemixSettings, read_settings

STOP_GRACE_S = 10.0
"""Services get this long; with NATS's own second after it, everything ends within 5 s."""


def ignore(event: str) -> None:
    """Nobody wants to hear of events."""


class LocalCluster:
    """Starts everything, keeps it running, stops it. An async context manager."""

    def __init__(
        self,
        options: ClusterOptions,
        *,
        on_event: Callable[[str], None] = ignore,
        command_of: CommandOf = module_command,
        clock: Clock | None = None,
    ) -> None:
        self._options = options
        self._on_event = on_event
        self._command_of = command_of
        self._clock = clock or SystemClock()
        self._run = RunFolder(options.run_dir)
        self._undo = AsyncExitStack()
        self._services: list[ServiceProcess] = []
        self._ready = False
        self._failed = asyncio.Event()
        self._error: ClusterFailedError | None = None
        self.nats_url = options.nats_url or ""
        self.nats_users = read_settings(LemixSettings).nats_users if options.nats_url else None
        """The folder of the NATS server's users; None: the server lets everybody in."""
        self.api_url = ""
        self.api_tls: ssl.SSLContext | None = None
        """With which programs of this machine reach the API, where it speaks TLS."""
        self.has_keys = False
        """Whether clients need a key."""

    @property
    def run_dir(self) -> Path:
        return self._run.path

    @property
    def pids(self) -> dict[str, int]:
        """Process id of each service, by its name."""
        return {service.name: service.pid for service in self._services if service.pid is not None}

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start all and return when a completion can be had; at a failure nothing is left running.

        Raises ConfigurationError for wrong options, BusError without NATS, ClusterFailedError when
        a service dies or nothing answers within the options' `start_timeout_s`.
        """
        self._options.validate()
        self.has_keys = _check_access(self._options)
        try:
            await self._start_processes()
            await self._until_healthy()
        except BaseException:
            await self.stop()
            raise
        self._ready = True
        self._describe()

    async def stop(self) -> None:
        """Stop all that was started, NATS last, and leave nothing behind; under 5 s, safe to call twice."""
        await self._undo.aclose()

    async def wait_failed(self) -> NoReturn:
        """Wait until the cluster cannot go on; raises the ClusterFailedError that ended it."""
        await self._failed.wait()
        assert self._error is not None
        raise self._error

    async def _start_processes(self) -> None:
        """Whatever is started is noted in `_undo` first, so that it is undone in the opposite order."""
        self._run.claim()
        self._undo.callback(self._run.release)
        port = claim_port(self._options.host, self._options.port)
        if (certificate := _gateway_settings(self._options).tls_certificate) is not None:
            self.api_tls = trusting(certificate)
        self.api_url = api_url_of(self._options.host, port, has_tls=self.api_tls is not None)
        remove_abandoned(default_base())
        arenas = ArenaFolder.create(default_base())
        self._undo.callback(arenas.remove)
        if self.nats_url:
            await require_unused(self.nats_url, self.nats_users)
        else:
            await self._start_nats()
        specs = service_specs(
            self._options,
            nats_url=self.nats_url,
            nats_users=self.nats_users,
            port=port,
            shm_dir=arenas.path,
            num_cores=num_cpu_cores(),
            inherited=os.environ,
            command_of=self._command_of,
        )
        await self._start_services(specs)

    async def _start_nats(self) -> None:
        port = self._options.nats_port or self._run.nats_port
        if port is not None:
            claim_port(LOOPBACK, port, option="--nats-port")
        self.nats_users = self._run.nats_users
        config = make_users(self.nats_users)
        server = NatsServer(self._run.nats_store, port=port, config=config)
        self._undo.push_async_callback(server.stop)
        await server.start()
        self._run.keep_nats_port(server.port)
        self.nats_url = server.url
        self._watch(server)

    async def _start_services(self, specs: Sequence[ServiceSpec]) -> None:
        self._services = [ServiceProcess(spec, self._run.logs / f"{spec.name}.log") for spec in specs]
        self._undo.push_async_callback(self._stop_services)
        for service in self._services:
            await service.start()
            self._watch(service)

    async def _stop_services(self) -> None:
        killed = await stop_all(self._services, grace_s=STOP_GRACE_S)
        for name in killed if self._ready else ():  # a start that failed has its own reason
            self._on_event(f"{name} did not stop within {STOP_GRACE_S:.0f} s and was killed")

    def _watch(self, process: Supervised) -> None:
        watcher = asyncio.create_task(self._keep_running(process), name=f"watch {process.name}")
        self._undo.push_async_callback(_cancel, watcher)

    async def _keep_running(self, process: Supervised) -> None:
        """Start the process again whenever it ends, until its budget is spent."""
        budget = RestartBudget()
        try:
            while True:
                ended = f"{process.name} ended with status {await process.wait()}"
                if not self._ready:
                    raise ClusterFailedError(f"{ended} while starting")
                if not budget.take(self._clock.now_s()):
                    raise ClusterFailedError(f"{ended}, {budget} are spent")
                self._on_event(f"{ended}; starting it again (log: {process.log})")
                await process.start()
                self._describe()
        except (LemixError, OSError) as error:
            self._fail(process, str(error))

    def _fail(self, process: Supervised, what: str) -> None:
        if self._error is None:
            lines = "".join(f"\n  {line}" for line in last_lines(process.log))
            self._error = ClusterFailedError(f"{what}; the end of {process.log}:{lines}")
        self._failed.set()

    async def _until_healthy(self) -> None:
        probe = HealthProbe(self.api_url, self.api_tls)
        well = asyncio.create_task(probe.wait())
        failed = asyncio.create_task(self.wait_failed())
        try:
            done, _ = await asyncio.wait(
                (well, failed), timeout=self._options.start_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
        finally:
            well.cancel()
            failed.cancel()
            await asyncio.gather(well, failed, return_exceptions=True)
        if not done:
            late = f"{self.api_url}/health was not well within {self._options.start_timeout_s:g} s"
            raise ClusterFailedError(f"{late}: {probe.last_answer}; logs are in {self._run.logs}")

    def _describe(self) -> None:
        self._run.write_cluster(
            ClusterFile(
                nats_url=self.nats_url,
                nats_users=self.nats_users,
                api_url=self.api_url,
                launcher_pid=os.getpid(),
                pids=self.pids,
            )
        )


def _check_access(options: ClusterOptions) -> bool:
    """Whether there are keys. Raises ConfigurationError when others could reach the API without one."""
    keys_file = _gateway_settings(options).keys_file or options.run_dir / KEYS_FILE
    has_keys = read_keys(keys_file) is not None
    check_exposure(options.host, has_keys=has_keys, insecure=options.insecure)
    return has_keys


def _gateway_settings(options: ClusterOptions) -> GatewaySettings:
    return read_settings(GatewaySettings, {**os.environ, **options.extra_env})


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
