"""How a service process begins and ends: settings in, TaskGroup, signals, deadline, bus closed."""

import asyncio
import gc
import logging
import random
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import uvloop

from shared.bus.access import access_of
from shared.bus.base import Bus
from shared.bus.nats import NatsBus
from shared.bus.permissions import Role
from shared.clock import Clock, IdSource, SystemClock
from shared.errors import ConfigurationError, LemixError
from shared.health import Health, show_readiness
from shared.settings import LemixSettings, S, read_settings
from shared.telemetry import Telemetry

SHUTDOWN_DEADLINE_S = 2.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The bus, the clock and the rest of the world that a service is given."""

    bus: Bus
    clock: Clock
    ids: IdSource
    telemetry: Telemetry
    nats_user: str = ""
    """The name by which NATS knows the process; empty where it asks for none."""
    health: Health = field(default_factory=Health)


ServiceMain = Callable[[World], Coroutine[Any, Any, None]]


class _Stopped(Exception):
    """A signal asked the service to end."""


def load_settings(kind: type[S]) -> S:
    """Read settings from the environment; wrong ones end the process with one clear line and status 1."""
    try:
        return read_settings(kind)
    except ConfigurationError as error:
        sys.exit(f"ERROR {error}")


def run_service(name: str, role: Role, settings: LemixSettings, main: ServiceMain) -> None:
    """Run `main` until it returns, a signal arrives, or the bus fails; then exit the process.

    `role`: whose NATS user the process is.

    Exit status 0 after a signal, 1 after an error that a person should read.
    """
    logging.basicConfig(level=settings.log_level, format=f"%(levelname)s {name}: %(message)s")
    show_readiness()
    failed = False
    try:
        uvloop.run(_serve(name, role, settings, main))
    except* LemixError as group:
        for error in _leaves(group):
            log.error("%s", error)
        failed = True  # sys.exit would become part of a group here, and be printed with its traceback
    finally:
        # The interpreter's last collection walks all that torch ever made: seconds, for nothing.
        gc.freeze()
    if failed:
        sys.exit(1)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


async def _serve(name: str, role: Role, settings: LemixSettings, main: ServiceMain) -> None:
    access = access_of(settings, role)
    telemetry = Telemetry.start(name, settings.run_dir)
    bus = await NatsBus.connect(
        settings.nats_url, name=name, access=access, traceparent=telemetry.traceparent
    )
    health = Health(settings.health_file)
    world = World(
        bus=bus,
        clock=SystemClock(),
        ids=IdSource(random.SystemRandom()),
        telemetry=telemetry,
        nats_user=access.user.name if access.user else "",
        health=health,
    )
    try:
        await run_until_stopped(main(world), bus.wait_failed(), health.keep(bus.answers))
    finally:
        async with asyncio.timeout(SHUTDOWN_DEADLINE_S):
            await bus.close()
        telemetry.close()


async def run_until_stopped(*mains: Awaitable[None]) -> None:
    """Run all `mains` in one TaskGroup; SIGINT or SIGTERM ends them, and so does the first to return."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    async def first_to_return(main: Awaitable[None]) -> None:
        await main
        stop.set()

    async def until_stopped() -> None:
        await stop.wait()
        raise _Stopped

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(until_stopped())
            for main in mains:
                group.create_task(first_to_return(main))
    except* _Stopped:
        pass
