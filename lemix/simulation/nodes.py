"""The nodes of a simulated cluster: real stage workers on emulated devices. They come, go and change."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lemix.simulation.device_noise import DeviceNoise
from lemix.simulation.devices import Devices
from lemix.simulation.loop import VirtualClock
from lemix.simulation.node_events import NodeEvent
from lemix.simulation.services import Running, Services
from services.stage_worker.compute.emulated import EmulatedDevice, EmulatedExecutor
from services.stage_worker.compute.executor import Executor
from services.stage_worker.process import StageProcess
from services.stage_worker.settings import StageWorkerSettings
from shared.lifecycle import World
from shared.slices import NumSlices

Compute = Callable[[EmulatedExecutor, StageWorkerSettings, str], Executor[Any, Any]]
"""(what takes a stage's time, the stage's settings, its instance) -> the stage's executor."""


def nothing(timed: EmulatedExecutor, settings: StageWorkerSettings, instance: str) -> EmulatedExecutor:
    """Compute nothing: only take the time."""
    return timed


@dataclass(frozen=True, slots=True)
class _Worker:
    """A stage worker that runs, and what it runs on."""

    running: Running
    device: EmulatedDevice


class SimulatedNodes:
    """Starts, ends and changes stage workers."""

    def __init__(
        self,
        services: Services,
        settings: StageWorkerSettings,
        devices: Devices,
        *,
        other_devices: Mapping[int, Devices],
        compute: Compute,
        handover_s: float,
        noise: DeviceNoise,
        clock: VirtualClock,
    ) -> None:
        """`settings`: of every stage but for its place. `other_devices`: by node, where they are not
        `devices`. `handover_s`: from the end of an op on a device until its service knows.
        """
        self._services = services
        self._settings = settings
        self._devices = devices
        self._other_devices = other_devices
        self._compute = compute
        self._handover_s = handover_s
        self._noise = noise
        self._clock = clock
        self._workers: dict[tuple[int, int], _Worker] = {}
        """By node and first stage."""

    def join(self, node: int) -> None:
        """Start a node, for the first time or again."""
        for stage in self._first_stages:
            self.start(node, stage)

    def start(self, node: int, stage: int) -> None:
        """Start a stage worker, the first one or a successor; `stage`: the first one that it holds."""
        device = EmulatedDevice()
        serve = partial(self._serve, node=node, stage=stage, device=device)
        self._workers[node, stage] = _Worker(self._services.start(serve), device)

    def crash(self, node: int, stage: int) -> None:
        """End a stage worker from one moment to the next: it can tell nobody."""
        running = self._workers.pop((node, stage)).running
        running.bus.cut()
        running.task.cancel()

    async def change(self, events: Sequence[NodeEvent]) -> None:
        """Let events happen, each at its time from now; they are in order."""
        began_s = self._clock.now_s()
        for event in events:
            await self._clock.sleep_until(began_s + event.at_s)
            for stage in () if event.kind == "join" else self._first_stages:
                self._change(event, stage)
            if event.kind == "join":
                self.join(event.node)

    def _change(self, event: NodeEvent, stage: int) -> None:
        if event.kind == "slow":
            self._workers[event.node, stage].device.slowdown = event.factor
        elif event.kind == "fail":
            self.crash(event.node, stage)
        else:
            self._workers.pop((event.node, stage)).running.task.cancel()

    @property
    def _first_stages(self) -> range:
        """The first stage of each worker."""
        return range(0, len(self._devices.times), self._settings.stages_held)

    def _devices_of(self, node: int) -> Devices:
        return self._other_devices.get(node, self._devices)

    async def _serve(self, world: World, node: int, stage: int, device: EmulatedDevice) -> None:
        """One worker; its stages share one device."""
        place = {
            "node": node,
            "stage": stage,
            "stages_held": min(self._settings.stages_held, len(self._devices.times) - stage),
            "kv_tokens": self._settings.kv_tokens or self._devices_of(node).kv_tokens,
            "node_profile": self._other_devices[node].name if node in self._other_devices else "",
        }
        executor = partial(self._executor, device=device)
        await StageProcess(self._settings.model_copy(update=place).of_stages, world, executor).run()

    def _executor(
        self, settings: StageWorkerSettings, instance: str, device: EmulatedDevice
    ) -> Executor[Any, Any]:
        devices = self._devices_of(settings.node)
        profile = devices.profile
        num_slices = settings.num_slices(profile.stages[settings.stage].num_layers) if profile else 1
        timed = EmulatedExecutor(
            settings,
            instance,
            times=self._noise.on(devices.times[settings.stage], settings.node, settings.stage),
            memory=profile.stages[settings.stage].memory if profile else None,
            vocab_size=devices.vocab_size,
            context_length=devices.context_length,
            num_slices=NumSlices(num_slices, num_slices),
            hold_until=self._known_done,
            clock=self._clock,
            device=device,
        )
        return self._compute(timed, settings, instance)

    async def _known_done(self, end_s: float) -> None:
        """Return when a stage knows that its device was done at `end_s`."""
        await self._clock.sleep_until(end_s + self._handover_s)
