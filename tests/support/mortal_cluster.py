"""Nodes of real stages and a real trainer in virtual time, whose parts die in the middle of a message."""

import asyncio
import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from lemix.lineage_command import read_lineage
from lemix.simulation.loop import VirtualClock
from services.stage_worker.compute.executor import ForwardOutput, GiveWay, Rows, go_on
from services.stage_worker.compute.local_stages import LocalStages
from services.stage_worker.compute.torch_executor import TorchExecutor
from services.stage_worker.process import StageProcess
from services.stage_worker.settings import StageWorkerSettings
from services.trainer.service import Trainer
from services.trainer.settings import TrainerSettings
from services.trainer.streams import TRAIN_STREAM
from shared import checkpoints
from shared.bus.base import Incoming
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.checkpoints import Checkpoint
from shared.clock import IdSource
from shared.errors import BusError
from shared.lifecycle import World
from shared.messages.base import Message
from shared.messages.cluster import Heartbeat
from shared.messages.inference import Placed
from shared.messages.training import (
    Microbatch,
    MicrobatchForward,
    StepOrder,
    TrainingTask,
)
from shared.messages.weights import RollBackWeights
from shared.subjects import BATCHES, PLACE, ROLLBACK
from shared.telemetry import NoTelemetry
from shared.tensors.ref import TensorRef
from tests.support.meetings import MeetingExecutor, Meetings
from tests.support.plain import State
from tests.support.training import Batch, named

DEADLINE_S = 300.0
"""Virtual."""
LOOK_EVERY_S = 0.1
RESTART_S = 0.3
"""The time that a launcher needs to start a dead process again."""
HOP_S = (0.0001, 0.002)
"""Shortest and longest time of a message on its way."""
ASK_AGAIN_S = 5.0
HOLD_S = 0.5
"""The time that the scheduler holds one batch in four."""


def victims(num_nodes: int, num_stages: int = 2, stages_held: int = 1) -> tuple[str, ...]:
    """All processes; one with several stages is named after the first."""
    first_stages = range(0, num_stages, stages_held)
    stages = (f"stage {node}.{stage}" for node in range(num_nodes) for stage in first_stages)
    return ("trainer", "scheduler", *stages)


@dataclass(frozen=True)
class Kill:
    """A process dies."""

    victim: str
    after: int
    """Messages on the bus since the cluster began, or since the kill before."""
    of: str = ""
    """Only those count whose subject this pattern finds."""


@dataclass
class _Process:
    bus: MemoryBus
    task: "asyncio.Task[None]"
    is_dead: bool = False


@dataclass
class MortalCluster:
    """Run it with `train`, in a virtual-time loop."""

    model: Path
    run_dir: Path
    seed: int
    """The seed of the times that messages take."""
    trainer_settings: dict[str, Any]
    stage_settings: dict[str, Any]
    kills: Sequence[Kill] = ()
    num_stages: int = 2
    stages_held: int = 1
    """Stages in each stage worker process."""
    num_nodes: int = 1
    """Batch number n is placed on node n modulo this."""
    goes_back: bool = False
    """To the oldest durable version, as soon as there is a newer one; asked for until it is answered."""
    orders: dict[str, StepOrder] = field(default_factory=dict)
    """The last step that was ordered on each batch: the one that is in the weights at the end."""
    states: list[State] = field(default_factory=list)
    """The state of each node at the end, where all stages hold every batch."""
    num_messages: int = 0
    num_killed: int = 0
    _published: list[bytes] = field(default_factory=list)
    _num_counted: int = 0
    """Messages since the last kill, of those that count for the next one."""
    _sizes: defaultdict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    """Batch -> microbatch -> examples in it, as it entered the first stage."""
    _met: dict[tuple[int, int, str, int], int] = field(default_factory=dict)
    """(fence, stage, batch, microbatch) -> weights version of its forward."""
    _processes: dict[str, _Process] = field(default_factory=dict)
    _executors: dict[str, TorchExecutor] = field(default_factory=dict)
    _held: dict[str, int] = field(default_factory=dict)
    """The weights version in the last heartbeat of each stage."""

    async def train(self, batches: Sequence[Batch]) -> Checkpoint:
        """Train on all batches whatever dies meanwhile; returns the checkpoint that contains them, when all
        stages do too.

        Raises TimeoutError when that is not so in time.
        """
        rng = self._rng = random.Random(self.seed)
        self._ids = IdSource(random.Random(0))
        self._meetings = Meetings()
        self._clock = VirtualClock(asyncio.get_running_loop())
        self._broker = MemoryBroker(carriage=lambda subject: [rng.uniform(*HOP_S)], observe=self._observe)
        bus = self._broker.connect()
        await bus.ensure_stream(TRAIN_STREAM)
        self._published = bodies_of(batches)
        for body in self._published:
            await bus.publish_durable(BATCHES, body)
        async with asyncio.TaskGroup() as group:
            self._group = group
            for name in self._victims:
                self._start(name)
            try:
                async with asyncio.timeout(DEADLINE_S):
                    if self.goes_back:
                        await self._roll_back(bus)
                    while (found := self._durable(len(batches))) is None:  # noqa: ASYNC110 # on the disk
                        await asyncio.sleep(LOOK_EVERY_S)
                    self.states = [await self._state_of(node) for node in range(self.num_nodes)]
            finally:
                for process in self._processes.values():
                    process.task.cancel()
        return found

    @property
    def met(self) -> dict[tuple[int, str, int], int]:
        """(stage, batch, microbatch) -> weights version of the forward whose gradients were stepped on in the
        end.
        """
        return {
            (stage, batch_id, index): version
            for (fence, stage, batch_id, index), version in self._met.items()
            if fence == self.orders[batch_id].fence
        }

    def cut(self, batch_id: str, batch: Batch) -> Batch:
        """The batch in microbatches as they were fed."""
        examples, sizes = chain.from_iterable(batch), self._sizes[batch_id]
        return [list(islice(examples, sizes[index])) for index in sorted(sizes)]

    def rejected(self) -> list[bytes]:
        return [body for body, _ in self._broker.streams["LEMIX_REJECTED"].messages]

    def assert_lineage(self, found: Checkpoint) -> None:
        """The lineage file tells of all batches of a checkpoint, in their order, as they were published."""
        told = read_lineage(self.run_dir / "checkpoints", found.manifest.version, found.manifest.node)
        hashes = {json.loads(body)["id"]: hashlib.sha256(body).hexdigest() for body in self._published}
        expected = [(batch_id, hashes[batch_id]) for batch_id in found.manifest.recent_batch_ids]
        assert told.num_unknown == 0
        assert [(batch.id, batch.sha256) for batch in told.batches] == expected

    def durable(self) -> list[Checkpoint]:
        """The checkpoints of all nodes, oldest first."""
        root = self.run_dir / "checkpoints"
        found = (each for node in range(self.num_nodes) for each in checkpoints.checkpoints(root, node))
        return sorted(found, key=lambda checkpoint: checkpoint.manifest.version)

    @property
    def _victims(self) -> tuple[str, ...]:
        return victims(self.num_nodes, self.num_stages, self.stages_held)

    def _durable(self, num_batches: int) -> Checkpoint | None:
        """The newest checkpoint, if all stages hold it and it accounts for all batches."""
        *_, newest = [None, *self.durable()]
        held = {
            self._held.get(f"stage {node}.{stage}")
            for node in range(self.num_nodes)
            for stage in range(self.num_stages)
        }
        if newest is None or held != {newest.manifest.version}:
            return None
        num_done = newest.manifest.version + len(newest.manifest.discarded_batch_ids)
        return newest if num_done == num_batches else None

    async def _roll_back(self, bus: MemoryBus) -> None:
        while len(durable := self.durable()) < 2:  # noqa: ASYNC110 # on the disk
            await asyncio.sleep(LOOK_EVERY_S)
        order = RollBackWeights(version=durable[0].manifest.version)
        while True:
            try:
                await bus.request(ROLLBACK.at(), order, timeout_s=ASK_AGAIN_S)
                self._held.clear()  # they may have held that version before
                return
            except BusError:  # the trainer is dead, or dies
                await asyncio.sleep(LOOK_EVERY_S)

    async def _state_of(self, node: int) -> State:
        """The weights that all stages of the node hold; those that two of them hold are the same."""
        state: State = {}
        for stage in range(self.num_stages):
            copying = await self._executors[f"stage {node}.{stage}"].snapshot()
            snapshot = copying.result()
            for name, tensor in (snapshot.weights | snapshot.optimizer).items():
                assert name not in state or torch.equal(state[name], tensor), name
                state[name] = tensor
        return state

    def _observe(self, subject: str, message: Message, now_s: float) -> None:
        match message:
            case Heartbeat(node=node, stage=stage, weights_version=version):
                self._held[f"stage {node}.{stage}"] = version
            case StepOrder(batch_id=batch_id, skip=False):
                self.orders[batch_id] = message
            case MicrobatchForward(microbatch=fed, hidden=None):
                self._sizes[fed.batch_id][fed.index] = len(fed.lengths)
        self.num_messages += 1
        upcoming = self.kills[self.num_killed] if self.num_killed < len(self.kills) else None
        if upcoming is None or not re.search(upcoming.of, subject):
            return
        self._num_counted += 1
        if self._num_counted == upcoming.after:
            self.num_killed, self._num_counted = self.num_killed + 1, 0
            self._kill(upcoming.victim)

    def _note_met(self, stage: int, microbatch: Microbatch, version: int) -> None:
        self._met[microbatch.fence, stage, microbatch.batch_id, microbatch.index] = version

    def _kill(self, name: str) -> None:
        """At once, as the kernel does: what it was about to say is never said."""
        process = self._processes[name]
        if process.is_dead:  # and not yet started again
            return
        process.is_dead = True
        if name.startswith("stage"):
            for own in self._settings_of(name).of_stages:
                self._held.pop(f"stage {own.node}.{own.stage}", None)
        process.bus.cut()
        process.task.cancel()
        asyncio.get_running_loop().call_later(RESTART_S, self._start, name)

    def _start(self, name: str) -> None:
        bus = self._broker.connect()
        main = self._main_of(name)
        self._processes[name] = _Process(bus, self._group.create_task(self._run(bus, main)))

    async def _run(self, bus: MemoryBus, main: Callable[[MemoryBus], Awaitable[None]]) -> None:
        """A process that fails by itself fails the test."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(bus.wait_failed())
                group.create_task(main(bus))
        finally:
            await bus.close()

    def _main_of(self, name: str) -> Callable[[MemoryBus], Awaitable[None]]:
        if name == "trainer":
            return self._trainer
        if name == "scheduler":
            return self._scheduler
        return lambda bus: self._stages(bus, name)

    async def _trainer(self, bus: MemoryBus) -> None:
        settings = TrainerSettings.given(model=str(self.model), run_dir=self.run_dir, **self.trainer_settings)
        await Trainer(settings, bus=bus, clock=self._clock, telemetry=NoTelemetry()).run()

    async def _scheduler(self, bus: MemoryBus) -> None:
        """Has nodes take turns, and holds a batch for a while, as one that defers it does."""

        async def place(incoming: Incoming[TrainingTask]) -> Placed:
            await asyncio.sleep(self._rng.choice((0.0, 0.0, 0.0, HOLD_S)))
            return Placed(node=int(incoming.message.task_id.removeprefix("b")) % self.num_nodes)

        await bus.respond(PLACE.at(), place)
        await asyncio.get_running_loop().create_future()

    def _settings_of(self, name: str) -> StageWorkerSettings:
        """The stage worker process of that name."""
        node, _, stage = name.removeprefix("stage ").partition(".")
        return StageWorkerSettings.given(
            node=int(node),
            stage=int(stage),
            stages_held=min(self.stages_held, self.num_stages - int(stage)),
            num_stages=self.num_stages,
            model=str(self.model),
            run_dir=self.run_dir,
            shm_dir=self.run_dir,
            **self.stage_settings,
        )

    async def _stages(self, bus: MemoryBus, name: str) -> None:
        local = LocalStages()

        def executor(own: StageWorkerSettings, instance: str) -> MeetingExecutor:
            note = partial(self._note_met, own.stage)
            made = _NotingExecutor(own, instance, self._meetings, local, note)
            self._executors[f"stage {own.node}.{own.stage}"] = made
            return made

        world = World(bus=bus, clock=self._clock, ids=self._ids, telemetry=NoTelemetry())
        await StageProcess(self._settings_of(name).of_stages, world, executor).run()


class _NotingExecutor(MeetingExecutor):
    """Notes which weights each forward meets."""

    def __init__(
        self,
        settings: StageWorkerSettings,
        instance: str,
        meetings: Meetings,
        local: LocalStages,
        note: Callable[[Microbatch, int], None],
    ) -> None:
        super().__init__(settings, instance, meetings, local)
        self._note = note

    async def forward(
        self,
        microbatch: Microbatch,
        rows: Rows,
        reference: TensorRef | None = None,
        give_way: GiveWay = go_on,
    ) -> ForwardOutput:
        output = await super().forward(microbatch, rows, reference, give_way)
        self._note(microbatch, output.version)
        return output


def bodies_of(batches: Sequence[Batch]) -> list[bytes]:
    """As they are published."""
    return [_body(batch_id, batch) for batch_id, batch in named(batches).items()]


def _body(batch_id: str, batch: Batch) -> bytes:
    examples = [{"token_ids": example} for microbatch in batch for example in microbatch]
    return json.dumps({"id": batch_id, "examples": examples}).encode()
