"""A node of real stages and a real trainer in virtual time, whose parts die in the middle of a message."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lemix.simulation.loop import VirtualClock
from services.stage_worker.executor.torch import TorchExecutor
from services.stage_worker.service import StageWorker
from services.stage_worker.settings import StageWorkerSettings
from services.trainer.service import Trainer
from services.trainer.settings import TrainerSettings
from services.trainer.streams import TRAIN_STREAM
from shared import checkpoints
from shared.bus.base import Incoming
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.checkpoints import Checkpoint
from shared.clock import IdSource
from shared.messages.base import Message
from shared.messages.inference import Placed
from shared.messages.training import TrainingTask
from shared.subjects import BATCHES, PLACE
from shared.telemetry import NoTelemetry
from tests.support.training import Batch

NUM_STAGES = 2
DEADLINE_S = 300.0
"""Virtual."""
LOOK_EVERY_S = 0.1
RESTART_S = 0.3
"""What a launcher needs to start a dead process again."""
HOP_S = (0.0001, 0.002)
"""Shortest and longest time of a message on its way."""
HOLD_S = 0.5
"""Of one batch in four, in the scheduler."""

VICTIMS = ("trainer", "scheduler", "stage 0", "stage 1")


@dataclass(frozen=True)
class Kill:
    """A process dies."""

    victim: str
    after: int
    """Messages on the bus since the cluster began, or since the kill before."""


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
    """Of the times that messages take."""
    trainer_settings: dict[str, Any]
    stage_settings: dict[str, Any]
    kills: Sequence[Kill] = ()
    num_messages: int = 0
    """Since the last kill."""
    num_killed: int = 0
    _processes: dict[str, _Process] = field(default_factory=dict)

    async def train(self, batches: Sequence[Batch]) -> Checkpoint:
        """Train on all batches whatever dies meanwhile; returns the checkpoint that contains them.

        Raises TimeoutError when there is none in time.
        """
        rng = self._rng = random.Random(self.seed)
        self._ids = IdSource(random.Random(0))
        self._clock = VirtualClock(asyncio.get_running_loop())
        self._broker = MemoryBroker(carriage=lambda subject: [rng.uniform(*HOP_S)], observe=self._observe)
        bus = self._broker.connect()
        await bus.ensure_stream(TRAIN_STREAM)
        for body in bodies_of(batches):
            await bus.publish_durable(BATCHES, body)
        async with asyncio.TaskGroup() as group:
            self._group = group
            for name in VICTIMS:
                self._start(name)
            try:
                async with asyncio.timeout(DEADLINE_S):
                    while (found := self._durable(len(batches))) is None:  # noqa: ASYNC110 # on the disk
                        await asyncio.sleep(LOOK_EVERY_S)
            finally:
                for process in self._processes.values():
                    process.task.cancel()
        return found

    def rejected(self) -> list[bytes]:
        return [body for body, _ in self._broker.streams["LEMIX_REJECTED"].messages]

    def _durable(self, version: int) -> Checkpoint | None:
        found = checkpoints.latest(self.run_dir / "checkpoints", 0)
        return found if found and found.manifest.version == version else None

    def _observe(self, subject: str, message: Message, now_s: float) -> None:
        self.num_messages += 1
        if self.num_killed < len(self.kills) and self.num_messages >= self.kills[self.num_killed].after:
            victim = self.kills[self.num_killed].victim
            self.num_killed, self.num_messages = self.num_killed + 1, 0
            self._kill(victim)

    def _kill(self, name: str) -> None:
        """At once, as the kernel does: what it was about to say is never said."""
        process = self._processes[name]
        if process.is_dead:  # and not yet started again
            return
        process.is_dead = True
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
        stage = int(name.removeprefix("stage "))
        return lambda bus: self._stage(bus, stage)

    async def _trainer(self, bus: MemoryBus) -> None:
        settings = TrainerSettings.given(model=str(self.model), run_dir=self.run_dir, **self.trainer_settings)
        await Trainer(settings, bus=bus, clock=self._clock, telemetry=NoTelemetry()).run()

    async def _scheduler(self, bus: MemoryBus) -> None:
        """Knows of one node, and holds a batch for a while, as one that defers it does."""

        async def place(incoming: Incoming[TrainingTask]) -> Placed:
            await asyncio.sleep(self._rng.choice((0.0, 0.0, 0.0, HOLD_S)))
            return Placed(node=0)

        await bus.respond(PLACE.at(), place)
        await asyncio.get_running_loop().create_future()

    async def _stage(self, bus: MemoryBus, stage: int) -> None:
        settings = StageWorkerSettings.given(
            node=0,
            stage=stage,
            num_stages=NUM_STAGES,
            model=str(self.model),
            run_dir=self.run_dir,
            shm_dir=self.run_dir,
            **self.stage_settings,
        )
        instance = self._ids.new("stage")
        await StageWorker(
            settings=settings,
            instance=instance,
            bus=bus,
            clock=self._clock,
            telemetry=NoTelemetry(),
            executor=TorchExecutor(settings, instance),
        ).run()


def bodies_of(batches: Sequence[Batch]) -> list[bytes]:
    """As they are published: under the ids b0, b1, ..."""
    return [_body(number, batch) for number, batch in enumerate(batches)]


def _body(number: int, batch: Batch) -> bytes:
    examples = [{"token_ids": example} for microbatch in batch for example in microbatch]
    return json.dumps({"id": f"b{number}", "examples": examples}).encode()
