"""The running services of a simulated cluster: each has a connection of its own, and all share one clock."""

import asyncio
from dataclasses import dataclass

from shared.bus.memory import MemoryBroker, MemoryBus
from shared.clock import Clock, IdSource
from shared.lifecycle import ServiceMain, World
from shared.telemetry import NoTelemetry


@dataclass(frozen=True, slots=True)
class Running:
    """A service that runs."""

    task: asyncio.Task[None]
    bus: MemoryBus


class Services:
    """Starts services, and ends all of them."""

    def __init__(
        self, broker: MemoryBroker, *, clock: Clock, ids: IdSource, group: asyncio.TaskGroup
    ) -> None:
        self._broker = broker
        self._clock = clock
        self._ids = ids
        self._group = group
        self._telemetry = NoTelemetry()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, main: ServiceMain) -> Running:
        """Start a service; an error that ends it ends the group."""
        bus = self._broker.connect()
        task = self._group.create_task(self._serve(bus, main))
        self._tasks.append(task)
        return Running(task, bus)

    def end(self) -> None:
        """Stop everything."""
        for task in self._tasks:
            task.cancel()

    def world(self) -> World:
        """A world with a connection of its own."""
        return self._world(self._broker.connect())

    def _world(self, bus: MemoryBus) -> World:
        return World(bus=bus, clock=self._clock, ids=self._ids, telemetry=self._telemetry)

    async def _serve(self, bus: MemoryBus, main: ServiceMain) -> None:
        """Run a service until it, or its bus, fails."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(main(self._world(bus)))
                group.create_task(bus.wait_failed())
        finally:
            await bus.close()
