"""A node played by a script: stages whose weights are the list of batch ids that they contain."""

import asyncio
import hashlib
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from math import nan
from pathlib import Path

from msgspec import structs

from services.stage_worker.node.train_schedule import Enter, Lead, TrainSchedule
from shared.bus.base import Bus, Incoming
from shared.errors import RefusedError
from shared.messages.base import Done
from shared.messages.training import (
    GradientsReady,
    MicrobatchForward,
    SaveFailed,
    ShardSaved,
    StageEvent,
    StageReport,
    StepAhead,
    StepDone,
    StepOrder,
    TrainingFailed,
)
from shared.messages.weights import (
    MergeGroup,
    MergeWeights,
    ReduceGradients,
    RestoreWeights,
    SaveWeights,
)
from shared.subjects import FORWARD, HEARTBEAT, MERGE, REDUCE, REPORT, RESTORE, SAVE, STEP, STEP_AHEAD
from tests.support.cluster import heartbeat


@dataclass
class FakeStage:
    """One stage's state."""

    instance: str
    fence: int = 0
    contents: list[str] = field(default_factory=list)
    """Batches in its weights, in the order of their steps."""
    saves: dict[int, Path] = field(default_factory=dict)


class Meeting:
    """Where the fake stages of one merge meet: all of its members, and the same stage of each."""

    def __init__(self) -> None:
        self._contents: dict[tuple[str, int], dict[int, list[str]]] = defaultdict(dict)
        self._met = asyncio.Condition()

    async def union(self, group: MergeGroup, stage: int, node: int, contents: list[str]) -> list[str]:
        """The contents that all members bring, in their order; repeated ones count once."""
        brought = self._contents[group.name, stage]
        async with self._met:
            brought[node] = list(contents)
            self._met.notify_all()
            await self._met.wait_for(lambda: len(brought) == len(group.members))
        every = [batch_id for member in group.members for batch_id in brought[member.node]]
        return list(dict.fromkeys(every))


class FakeNode:
    """Runs each microbatch through all its stages at once; `happened` is told of every turn."""

    def __init__(self, bus: Bus, node: int, num_stages: int, meeting: Meeting | None = None) -> None:
        self._meeting = meeting or Meeting()
        self._joint: dict[str, list[str]] = {}
        """Batches behind averaged gradients, by what the step will be called here."""
        self._losses: dict[str, float] = defaultdict(float)
        self.node = node
        self.stages = [FakeStage(f"{node}.{stage}.0") for stage in range(num_stages)]
        self.restores: list[RestoreWeights] = []
        self.microbatches: list[MicrobatchForward] = []
        self.orders: list[StepOrder] = []
        self.merges: list[MergeWeights] = []
        self.diverging: set[str] = set()
        """Ids of batches whose gradients are not finite."""
        self.poison = ""
        """Id of a batch whose backward fails."""
        self.num_faults = 0
        """So many microbatches more fail, through no fault of their batch."""
        self.full_disk = False
        self.refuses_saves = False
        self.happened: Callable[[str], None] = lambda turn: None
        self._bus = bus
        self._num_restarts = 0

    async def start(self) -> None:
        await self._bus.subscribe(FORWARD.at(node=self.node, stage=0), self._on_forward)
        await self._bus.subscribe(STEP_AHEAD.at(node=self.node), self._on_step_ahead)
        await self._bus.subscribe(STEP.at(node=self.node, stage=0), self._on_order)
        for stage in range(len(self.stages)):
            await self._bus.respond(RESTORE.at(node=self.node, stage=stage), self._restorer(stage))
            await self._bus.respond(SAVE.at(node=self.node, stage=stage), self._saver(stage))
            await self._bus.respond(MERGE.at(node=self.node, stage=stage), self._merger(stage))
            await self._bus.subscribe(REDUCE.at(node=self.node, stage=stage), self._reducer(stage))

    async def beat(self) -> None:
        """All stages are alive and ready."""
        for number, stage in enumerate(self.stages):
            beat = heartbeat(self.node, number, num_stages=len(self.stages), instance=stage.instance)
            await self._bus.publish(HEARTBEAT.at(), structs.replace(beat, fence=stage.fence))

    def restart(self, stage: int) -> None:
        """The process dies and comes back with nothing of what it had learnt."""
        self._num_restarts += 1
        self.stages[stage] = FakeStage(f"{self.node}.{stage}.{self._num_restarts}")

    def _restorer(self, number: int) -> Callable[[Incoming[RestoreWeights]], "object"]:
        async def restore(incoming: Incoming[RestoreWeights]) -> Done:
            message, stage = incoming.message, self.stages[number]
            _check_fence(message.fence, stage)
            stage.fence = message.fence
            stage.saves.clear()
            weights = message.weights
            stage.contents = read_shard(Path(weights.checkpoint), number) if weights.checkpoint else []
            assert len(stage.contents) == weights.version
            if number == 0:
                self._schedule = TrainSchedule(
                    len(self.stages),
                    feeding=message.feeding,
                    stashing="full",
                    version=message.weights.version,
                )
                self._losses.clear()
            self.restores.append(message)
            self.happened("restore")
            return Done()

        return restore

    def _saver(self, number: int) -> Callable[[Incoming[SaveWeights]], "object"]:
        async def save(incoming: Incoming[SaveWeights]) -> Done:
            message, stage = incoming.message, self.stages[number]
            _check_fence(message.fence, stage)
            if self.refuses_saves or message.version < len(stage.contents):
                raise RefusedError(f"version {message.version} is gone")
            stage.saves = {version: at for version, at in stage.saves.items() if version < message.version}
            stage.saves[message.version] = Path(message.folder)
            self.happened("save")
            await self._save_if_due(number)
            return Done()

        return save

    async def _on_forward(self, incoming: Incoming[MicrobatchForward]) -> None:
        if self._is_of_now(incoming.message.microbatch.fence):
            await self._carry_out(self._schedule.feed(incoming.message))

    async def _on_step_ahead(self, incoming: Incoming[StepAhead]) -> None:
        if self._is_of_now(incoming.message.fence):
            await self._carry_out(self._schedule.step_ahead(incoming.message))

    async def _on_order(self, incoming: Incoming[StepOrder]) -> None:
        if self._is_of_now(incoming.message.fence):
            await self._carry_out(self._schedule.order(incoming.message))

    def _is_of_now(self, fence: int) -> bool:
        return all(fence == stage.fence for stage in self.stages)

    async def _carry_out(self, leads: list[Lead]) -> None:
        for lead in leads:
            match lead:
                case Enter(forward=forward):
                    await self._run(forward)
                case StepOrder():
                    await self._step(lead)
                case _:
                    await self._report(0, lead)

    async def _run(self, forward: MicrobatchForward) -> None:
        microbatch = forward.microbatch
        self.microbatches.append(forward)
        batch_id, index = microbatch.batch_id, microbatch.index
        self._losses[batch_id] += len(microbatch.labels) * microbatch.loss_weight
        self.happened("forward")
        last = len(self.stages) - 1
        if self.num_faults > 0:
            self.num_faults -= 1
            failed = TrainingFailed(batch_id=batch_id, reason="out of memory", is_batch_at_fault=False)
            await self._report(last, failed)
            return
        if batch_id == self.poison:
            await self._report(last, TrainingFailed(batch_id=batch_id, reason="NaN"))
            return
        await self._carry_out(self._schedule.left(batch_id, index, 0.0))
        self.happened("backward")
        if not self._is_of_now(microbatch.fence):
            return  # a stage has died meanwhile
        await self._carry_out(self._schedule.came_back(batch_id, index))
        if index == microbatch.count - 1:
            squared_norm = nan if batch_id in self.diverging else 1.0
            for number in range(last, -1, -1):
                await self._gradients_ready(number, batch_id, squared_norm)
            self.happened("gradients")

    async def _gradients_ready(self, number: int, batch_id: str, squared_norm: float) -> None:
        loss = self._losses.pop(batch_id, 0.0)
        ready = GradientsReady(batch_id=batch_id, squared_norm=squared_norm, loss=loss)
        await self._carry_out(self._schedule.gradients_ready(number, ready))

    def _merger(self, number: int) -> Callable[[Incoming[MergeWeights]], Awaitable[Done]]:
        async def merge(incoming: Incoming[MergeWeights]) -> Done:
            message, stage = incoming.message, self.stages[number]
            _check_fence(message.fence, stage)
            self.merges.append(message)
            self.happened("merge")
            stage.contents = await self._meeting.union(message.group, number, self.node, stage.contents)
            assert len(stage.contents) == message.version
            if number == 0:
                self._schedule.merged(message.version)
            return Done()

        return merge

    def _reducer(self, number: int) -> Callable[[Incoming[ReduceGradients]], Awaitable[None]]:
        async def reduce(incoming: Incoming[ReduceGradients]) -> None:
            message = incoming.message
            own = [message.batch_id] if message.batch_id else []
            name = message.batch_id or message.group.name
            every = await self._meeting.union(message.group, number, self.node, own)
            if self._is_of_now(message.fence):
                self._joint[name] = every
                await self._gradients_ready(number, name, 1.0)

        return reduce

    async def _step(self, order: StepOrder) -> None:
        for number in range(len(self.stages)):
            stage = self.stages[number]
            if order.fence != stage.fence:
                return  # it has died meanwhile, and never tells that it has stepped
            self.orders.append(order)
            if not order.skip:
                stage.contents += self._joint.get(order.batch_id, [order.batch_id])
            assert order.version == len(stage.contents)
            self.happened("step")
            await self._save_if_due(number)
        for number in range(len(self.stages)):
            if not self._is_of_now(order.fence):
                return
            done = StepDone(batch_id=order.batch_id, version=order.version)
            await self._carry_out(self._schedule.step_done(number, done))

    async def _save_if_due(self, number: int) -> None:
        stage = self.stages[number]
        version = len(stage.contents)
        folder = stage.saves.pop(version, None)
        if folder is None:
            return
        if self.full_disk:
            await self._report(number, SaveFailed(version=version, reason="no space left"))
            return
        name = shard_name(number, len(self.stages))
        weights = json.dumps(stage.contents).encode()
        (folder / name).write_bytes(weights)
        shard = ShardSaved(
            version=version,
            sha256_by_file={name: hashlib.sha256(weights).hexdigest()},
            file_by_tensor={f"t{number}": name},
            size_bytes=1,
        )
        await self._report(number, shard)
        self.happened("shard")

    async def _report(self, number: int, event: StageEvent) -> None:
        report = StageReport(node=self.node, stage=number, fence=self.stages[number].fence, event=event)
        await self._bus.publish(REPORT.at(), report)


def shard_name(number: int, num_stages: int) -> str:
    return f"model-{number + 1:05}-of-{num_stages:05}.safetensors"


def read_shard(folder: Path, number: int) -> list[str]:
    """The batch ids in a stage's share of a checkpoint."""
    (path,) = folder.glob(f"model-{number + 1:05}-of-*.safetensors")
    contents: list[str] = json.loads(path.read_text())
    return contents


def _check_fence(fence: int, stage: FakeStage) -> None:
    if fence < stage.fence:
        raise RefusedError(f"fence {fence} is over", code=409)
