"""A stage worker process: one or more consecutive stages of a node in one event loop.

Stages on one device share its queue, so that its discipline decides among the work of all of them. What the
stages tell each other stays in the process (shared/bus/near.py). They live and die together.
"""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from services.stage_worker.compute.executor import Executor
from services.stage_worker.pipeline.device import Device
from services.stage_worker.pipeline.disciplines import DISCIPLINES
from services.stage_worker.pipeline.queue import WorkQueue
from services.stage_worker.settings import StageWorkerSettings
from services.stage_worker.worker import StageWorker
from shared import subjects
from shared.bus.base import Bus
from shared.bus.near import NearBus
from shared.clock import Clock
from shared.errors import ConfigurationError
from shared.lifecycle import World

MakeExecutor = Callable[[StageWorkerSettings, str], Executor[Any, Any]]
"""(a stage's settings, its instance) -> what computes for it."""


class StageProcess:
    """The stages of one process. The same class runs in every world."""

    def __init__(
        self, stages: Sequence[StageWorkerSettings], world: World, make_executor: MakeExecutor
    ) -> None:
        """Raises ConfigurationError for an unknown discipline or a stage that is none of `num_stages`."""
        self._world = world
        self._name = _described(stages)
        self._make_executor = make_executor
        self._bus = _bus_of(stages, world)
        devices: dict[Hashable, Device] = {}
        for stage in stages:
            if _device_key(stage) not in devices:
                devices[_device_key(stage)] = _device(stage, world.clock)
        self._devices = tuple(devices.values())
        self.workers = {stage.stage: self._worker(stage, devices[_device_key(stage)]) for stage in stages}
        """By the number of the stage."""

    async def run(self) -> None:
        """Serve and train until cancelled; whatever fails ends all stages."""
        self._world.health.begin(self._name, self._is_well)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._bus.wait_failed())
                for device in self._devices:
                    group.create_task(device.queue.run())
                for worker in self.workers.values():
                    group.create_task(worker.run())
        finally:
            if self._bus is not self._world.bus:
                await self._bus.close()

    async def _is_well(self) -> bool:
        return all(worker.is_ready for worker in self.workers.values())

    def _worker(self, settings: StageWorkerSettings, device: Device) -> StageWorker:
        instance = self._world.ids.new("stage")
        return StageWorker(
            settings=settings,
            instance=instance,
            device=device,
            bus=self._bus,
            clock=self._world.clock,
            telemetry=self._world.telemetry,
            executor=self._make_executor(settings, instance),
        )


def _described(stages: Sequence[StageWorkerSettings]) -> str:
    numbers = ", ".join(str(stage.stage) for stage in stages)
    devices = ", ".join(dict.fromkeys(stage.device for stage in stages))
    return f"stage {numbers} of node {stages[0].node}, on {devices}"


def _bus_of(stages: Sequence[StageWorkerSettings], world: World) -> Bus:
    if len(stages) == 1:
        return world.bus
    first = stages[0]
    neighbours = subjects.NEIGHBOUR.at(node=first.node).name
    elsewhere = (neighbours,) if len(stages) < first.num_stages else ()
    return NearBus(world.bus, heard_elsewhere=elsewhere, traceparent=world.telemetry.traceparent)


def _device_key(settings: StageWorkerSettings) -> Hashable:
    """Each emulated stage has a device of its own."""
    return settings.stage if settings.emulate else settings.device


def _device(settings: StageWorkerSettings, clock: Clock) -> Device:
    if settings.discipline not in DISCIPLINES:
        raise ConfigurationError(f"discipline {settings.discipline!r} is none of {', '.join(DISCIPLINES)}")
    discipline = DISCIPLINES[settings.discipline](settings.training_patience_s)
    return Device(settings.stage, WorkQueue(clock, discipline, max_items=settings.max_queued))
