"""A whole cluster in one process and in virtual time: the real services, on emulated devices."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lemix.simulation.faults import NO_FAULTS, Faults, carriage
from lemix.simulation.loop import VirtualClock
from services.scheduler.costs import costs_named
from services.scheduler.objectives import DEFAULT_OBJECTIVES, MeanPrompt, Objectives
from services.scheduler.policies import policy_named, uses_profile
from services.scheduler.policies.memory import TrainingRoom
from services.scheduler.service import Scheduler
from services.stage_worker.compute.emulated import EmulatedDevice, EmulatedExecutor
from services.stage_worker.compute.executor import Executor
from services.stage_worker.process import StageProcess
from services.stage_worker.settings import StageWorkerSettings
from services.trainer.intake.reading import Intake
from services.trainer.service import Trainer
from services.trainer.settings import TrainerSettings
from shared.bus.memory import MemoryBroker, MemoryBus, Observer
from shared.clock import IdSource
from shared.encoding import ExampleEncoder
from shared.lifecycle import ServiceMain, World
from shared.messages.cluster import StatusRequest
from shared.model_files import ModelCard
from shared.profiles.profile import Profile, profile_named, stage_times
from shared.profiles.times import StageTimes
from shared.schedule import Feeding, ScheduleName
from shared.subjects import STATUS
from shared.telemetry import NoTelemetry

HOP_S = 0.0005
"""The time that a message takes from service to service."""
READY_DEADLINE_S = 60.0
LOOK_EVERY_S = 0.25
STATUS_TIMEOUT_S = 5.0
MAX_MICROBATCH_TOKENS = 1 << 16
"""No batch is cut smaller than it was meant to be."""
NO_FOLDER = Path("/simulated")
"""Where arenas would lie; named in messages, which must not differ between runs."""
NEVER = 10**9
CHECKPOINTS = {
    "checkpoint_every": NEVER,
    "checkpoint_idle_s": NEVER,
    "checkpoint_gb_per_hour": float(NEVER),
}
"""Checkpoints would only take the machine's time: the runs are short. Those of merges are written, as often
as there are merges. For merges of what is left at the end, set `checkpoint_idle_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOptions:
    """The cluster to simulate."""

    nodes: int
    stages: int | None = None
    """None: what the profile says."""
    profile: str
    policy: str
    schedule: ScheduleName = "async"
    discipline: str = "slo_first"
    costs: str = "affine"
    seed: int = 0
    hop_s: float = HOP_S
    handover_s: float = 0.0
    """Seconds from the end of an op on a device until its service knows."""
    objectives: Objectives = DEFAULT_OBJECTIVES
    faults: Faults = NO_FAULTS
    stage_settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of every stage worker (see StageWorkerSettings)."""
    trainer_settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the trainer (see TrainerSettings)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """The devices under the stages of every node, and the model that they run."""

    times: tuple[StageTimes, ...]
    """By stage."""
    vocab_size: int
    context_length: int
    kv_tokens: int
    profile: Profile | None = None
    """The scheduler's profile of them, and their memory. None: it learns, and memory is endless."""


def devices_of(options: SimulationOptions) -> Devices:
    """Devices as the profile says. Raises ConfigurationError when there is no such profile."""
    profile = profile_named(options.profile, options.stages)
    stages = range(profile.num_stages)
    return Devices(
        times=tuple(stage_times(options.profile, stage, profile.num_stages) for stage in stages),
        vocab_size=profile.vocab_size,
        context_length=profile.context_length,
        kv_tokens=profile.kv_tokens,
        profile=profile,
    )


Compute = Callable[[EmulatedExecutor, StageWorkerSettings, str], Executor[Any, Any]]
"""(what takes a stage's time, the stage's settings, its instance) -> the stage's executor."""


def nothing(timed: EmulatedExecutor, settings: StageWorkerSettings, instance: str) -> EmulatedExecutor:
    """Compute nothing: only take the time."""
    return timed


class SimulatedCluster:
    """All services of a cluster but the gateway; made by `running_cluster`."""

    def __init__(
        self,
        options: SimulationOptions,
        devices: Devices,
        *,
        group: asyncio.TaskGroup,
        folder: Path,
        observe: Observer | None,
        compute: Compute,
    ) -> None:
        rng = random.Random(options.seed)
        self._options = options
        self._devices = devices
        self._compute = compute
        self._group = group
        self._policy_rng = random.Random(rng.random())
        self._clock = VirtualClock(asyncio.get_running_loop())
        self._telemetry = NoTelemetry()
        self._ids = IdSource(random.Random(rng.random()))
        self._broker = MemoryBroker(
            checks_sizes=False,
            latency_s=options.hop_s,
            carriage=carriage(options.faults, hop_s=options.hop_s, rng=random.Random(rng.random())),
            observe=observe,
        )
        self._stage_settings = StageWorkerSettings.given(
            node=0,
            stage=0,
            num_stages=len(devices.times),
            discipline=options.discipline,
            model=options.profile,
            device=options.profile,
            run_dir=folder,
            shm_dir=NO_FOLDER,
            **{"kv_tokens": devices.kv_tokens, **options.stage_settings},
        )
        self._trainer_settings = TrainerSettings.given(
            schedule=options.schedule,
            run_dir=folder,
            max_microbatch_tokens=MAX_MICROBATCH_TOKENS,
            max_pending=NEVER,
            **{**CHECKPOINTS, **options.trainer_settings},
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._stages: dict[tuple[int, int], tuple[asyncio.Task[None], MemoryBus]] = {}
        self.world = self._world(self._broker.connect())
        """For whoever drives the cluster."""

    async def begin(self) -> None:
        """Start everything; returns when all nodes can serve and train."""
        self._start(self._broker.connect(), self._scheduler)
        self._start(self._broker.connect(), self._trainer)
        for node in range(self._options.nodes):
            for stage in range(0, len(self._devices.times), self._stage_settings.stages_held):
                self.start(node, stage)
        async with asyncio.timeout(READY_DEADLINE_S):
            await asyncio.sleep(LOOK_EVERY_S)
            while not await self._is_ready():  # noqa: ASYNC110  # the status can only be asked for
                await asyncio.sleep(LOOK_EVERY_S)

    def end(self) -> None:
        """Stop everything."""
        for task in self._tasks:
            task.cancel()

    def start(self, node: int, stage: int) -> None:
        """Start a stage worker, the first one or a successor; `stage`: the first one that it holds."""
        bus = self._broker.connect()
        serve = partial(self._stage_worker, node=node, stage=stage)
        self._stages[node, stage] = self._start(bus, serve), bus

    def crash(self, node: int, stage: int) -> None:
        """End a stage worker from one moment to the next: it can tell nobody."""
        task, bus = self._stages.pop((node, stage))
        bus.cut()
        task.cancel()

    def _world(self, bus: MemoryBus) -> World:
        return World(bus=bus, clock=self._clock, ids=self._ids, telemetry=self._telemetry)

    def _start(self, bus: MemoryBus, main: ServiceMain) -> asyncio.Task[None]:
        task = self._group.create_task(self._serve(bus, main))
        self._tasks.append(task)
        return task

    async def _serve(self, bus: MemoryBus, main: ServiceMain) -> None:
        """Run a service until it, or its bus, fails."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(main(self._world(bus)))
                group.create_task(bus.wait_failed())
        finally:
            await bus.close()

    async def _is_ready(self) -> bool:
        status = await self.world.bus.request(STATUS.at(), StatusRequest(), timeout_s=STATUS_TIMEOUT_S)
        return len(status.nodes) == self._options.nodes and all(
            node.ready and all(beat.fence for beat in node.stages) for node in status.nodes
        )

    async def _scheduler(self, world: World) -> None:
        options, profile = self._options, self._devices.profile
        room = TrainingRoom.of(profile) if profile else None
        policy = policy_named(options.policy, self._policy_rng.random, room)
        await Scheduler(
            world,
            policy,
            costs=costs_named(options.costs, profile if uses_profile(policy) else None, options.hop_s),
            mean_prompt=MeanPrompt.of(profile) if profile else None,
            objectives=options.objectives,
            feeding=Feeding(schedule=options.schedule),
        ).run()

    async def _trainer(self, world: World) -> None:
        await Trainer(
            self._trainer_settings,
            bus=world.bus,
            clock=world.clock,
            telemetry=world.telemetry,
            intake=self._intake(),
            checks_weights=False,
        ).run()

    def _intake(self) -> Intake:
        """Takes token ids of the emulated model, which has no tokenizer."""
        settings, devices = self._trainer_settings, self._devices
        card = ModelCard(
            name=self._options.profile,
            model_type="",
            vocab_size=devices.vocab_size,
            context_length=devices.context_length,
            bos_token_id=None,
            eos_token_ids=(),
        )
        encoder = ExampleEncoder(
            card=card, max_tokens=devices.context_length, tokenizer=None, chat_template=None
        )
        return Intake(
            encoder=encoder,
            microbatches=settings.microbatches,
            max_microbatch_tokens=settings.max_microbatch_tokens,
        )

    async def _stage_worker(self, world: World, node: int, stage: int) -> None:
        """One worker; its stages share one device."""
        held = min(self._stage_settings.stages_held, len(self._devices.times) - stage)
        settings = self._stage_settings.model_copy(update={"node": node, "stage": stage, "stages_held": held})
        executor = partial(self._executor, device=EmulatedDevice())
        await StageProcess(settings.of_stages, world, executor).run()

    def _executor(
        self, settings: StageWorkerSettings, instance: str, device: EmulatedDevice
    ) -> Executor[Any, Any]:
        profile = self._devices.profile
        timed = EmulatedExecutor(
            settings,
            instance,
            times=self._devices.times[settings.stage],
            memory=profile.stages[settings.stage].memory if profile else None,
            vocab_size=self._devices.vocab_size,
            context_length=self._devices.context_length,
            hold_until=self._known_done,
            clock=self._clock,
            device=device,
        )
        return self._compute(timed, settings, instance)

    async def _known_done(self, end_s: float) -> None:
        """Return when a stage knows that its device was done at `end_s`."""
        await self._clock.sleep_until(end_s + self._options.handover_s)


@asynccontextmanager
async def running_cluster(
    options: SimulationOptions,
    *,
    devices: Devices,
    observe: Observer | None = None,
    compute: Compute = nothing,
) -> AsyncIterator[SimulatedCluster]:
    """A cluster that is ready to serve and to train. Raises the first error that ends one of its services."""
    with TemporaryDirectory(prefix="lemix-simulation-") as folder:
        try:
            async with asyncio.TaskGroup() as group:
                cluster = SimulatedCluster(
                    options, devices, group=group, folder=Path(folder), observe=observe, compute=compute
                )
                await cluster.begin()
                yield cluster
                cluster.end()
        except BaseExceptionGroup as errors:
            raise first_of(errors) from None


def first_of(error: BaseException) -> BaseException:
    """The first error of a group, and of the groups in it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@asynccontextmanager
async def simulated_cluster(options: SimulationOptions, compute: Compute = nothing) -> AsyncIterator[World]:
    """The world of a cluster that is ready to serve and to train."""
    async with running_cluster(options, devices=devices_of(options), compute=compute) as cluster:
        yield cluster.world
