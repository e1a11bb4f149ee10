"""A whole cluster in one process and in virtual time: the real services, on emulated devices."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lemix.simulation.device_noise import DeviceNoise
from lemix.simulation.devices import Devices, check_one_model, devices_named
from lemix.simulation.faults import NO_FAULTS, Faults, carriage
from lemix.simulation.loop import VirtualClock
from lemix.simulation.node_events import NodeEvent, in_order
from lemix.simulation.nodes import Compute, SimulatedNodes, nothing
from lemix.simulation.services import Services
from services.scheduler.costs import Costs, costs_named
from services.scheduler.objectives import DEFAULT_OBJECTIVES, MeanPrompt, Objectives
from services.scheduler.policies import policy_named, uses_profile
from services.scheduler.policies.memory import TrainingRoom
from services.scheduler.service import Scheduler
from services.stage_worker.settings import StageWorkerSettings
from services.trainer.intake.reading import Intake
from services.trainer.service import Trainer
from services.trainer.settings import TrainerSettings
from shared.bus.memory import MemoryBroker, Observer
from shared.clock import IdSource
from shared.encoding import ExampleEncoder
from shared.lifecycle import World
from shared.messages.cluster import StatusRequest
from shared.model_files import ModelCard
from shared.profiles.profile import profile_named
from shared.schedule import Feeding, ScheduleName
from shared.subjects import STATUS

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
    device_noise: float = 0.0
    """Spread of each op's time around its device's own (see `NoisyTimes.sigma`)."""
    device_bias: float = 0.0
    """Spread of how far devices are off their profile, by the size of the op (see `BiasedTimes`)."""
    objectives: Objectives = DEFAULT_OBJECTIVES
    faults: Faults = NO_FAULTS
    node_profiles: Mapping[int, str] = field(default_factory=dict)
    """By node, where it has other devices than `profile` says."""
    events: tuple[NodeEvent, ...] = ()
    """The changes of nodes during the run."""
    stage_settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of every stage worker (see StageWorkerSettings)."""
    trainer_settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the trainer (see TrainerSettings)."""


def devices_of(options: SimulationOptions) -> Devices:
    """Devices as the profile says. Raises ConfigurationError when there is no such profile."""
    return devices_named(options.profile, options.stages)


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
        self._policy_rng = random.Random(rng.random())
        clock = VirtualClock(asyncio.get_running_loop())
        ids = IdSource(random.Random(rng.random()))
        broker = MemoryBroker(
            checks_sizes=False,
            latency_s=options.hop_s,
            carriage=carriage(options.faults, hop_s=options.hop_s, rng=random.Random(rng.random())),
            observe=observe,
        )
        self.services = Services(broker, clock=clock, ids=ids, group=group)
        self.world = self.services.world()
        """For whoever drives the cluster."""
        stage_settings = StageWorkerSettings.given(
            node=0,
            stage=0,
            num_stages=len(devices.times),
            discipline=options.discipline,
            model=options.profile,
            device=options.profile,
            run_dir=folder,
            shm_dir=NO_FOLDER,
            **options.stage_settings,
        )
        self._trainer_settings = TrainerSettings.given(
            schedule=options.schedule,
            run_dir=folder,
            max_microbatch_tokens=MAX_MICROBATCH_TOKENS,
            max_pending=NEVER,
            **{**CHECKPOINTS, **options.trainer_settings},
        )
        other_devices = {
            node: devices_named(name, len(devices.times)) for node, name in options.node_profiles.items()
        }
        check_one_model(devices, other_devices.values())
        self.nodes = SimulatedNodes(
            self.services,
            stage_settings,
            devices,
            other_devices=other_devices,
            compute=compute,
            handover_s=options.handover_s,
            noise=DeviceNoise(options.device_noise, options.device_bias, options.seed),
            clock=clock,
        )

    async def begin(self) -> None:
        """Start everything; returns when all nodes can serve and train."""
        self.services.start(self._scheduler)
        self.services.start(self._trainer)
        for node in range(self._options.nodes):
            self.nodes.join(node)
        async with asyncio.timeout(READY_DEADLINE_S):
            await asyncio.sleep(LOOK_EVERY_S)
            while not await self._is_ready():  # noqa: ASYNC110  # the status can only be asked for
                await asyncio.sleep(LOOK_EVERY_S)

    def end(self) -> None:
        """Stop everything."""
        self.services.end()

    async def _is_ready(self) -> bool:
        status = await self.world.bus.request(STATUS.at(), StatusRequest(), timeout_s=STATUS_TIMEOUT_S)
        return len(status.nodes) == self._options.nodes and all(
            node.ready and all(beat.fence for beat in node.stages) for node in status.nodes
        )

    async def _scheduler(self, world: World) -> None:
        options, profile = self._options, self._devices.profile
        room = TrainingRoom.of(profile) if profile else None
        policy = policy_named(options.policy, self._policy_rng.random, room)
        costs = costs_named(options.costs, profile if uses_profile(policy) else None, options.hop_s)

        def costs_of(name: str) -> Costs:
            if not uses_profile(policy):
                return costs
            return costs_named(options.costs, profile_named(name, options.stages), options.hop_s)

        await Scheduler(
            world,
            policy,
            costs=costs,
            costs_of=costs_of,
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


@asynccontextmanager
async def running_cluster(
    options: SimulationOptions,
    *,
    devices: Devices,
    observe: Observer | None = None,
    compute: Compute = nothing,
) -> AsyncIterator[SimulatedCluster]:
    """A cluster that is ready to serve and to train; from then on its nodes change as the options say.

    Raises the first error that ends one of its services.
    """
    events = in_order(options.events, options.nodes)
    with TemporaryDirectory(prefix="lemix-simulation-") as folder:
        try:
            async with asyncio.TaskGroup() as group:
                cluster = SimulatedCluster(
                    options, devices, group=group, folder=Path(folder), observe=observe, compute=compute
                )
                await cluster.begin()
                changing = group.create_task(cluster.nodes.change(events))
                yield cluster
                changing.cancel()
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
