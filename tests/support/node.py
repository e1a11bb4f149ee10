"""Nodes of real stage workers with torch executors, in this process, on the memory bus."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from msgspec import structs

from services.stage_worker.process import StageProcess
from services.stage_worker.settings import StageWorkerSettings
from services.stage_worker.worker import StageWorker
from shared import subjects
from shared.bus.base import Bus, Incoming
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.clock import Clock, IdSource, SystemClock
from shared.lifecycle import World
from shared.messages.base import Message
from shared.messages.cluster import Heartbeat
from shared.messages.inference import (
    CancelTask,
    InferenceTask,
    Sampling,
    TaskFailed,
    TokenLogprob,
    TokensProduced,
)
from shared.messages.training import (
    BatchReady,
    MicrobatchForward,
    SaveFailed,
    StageReport,
    StepAhead,
    StepOrder,
    TrainingFailed,
    VersionsServed,
)
from shared.messages.weights import (
    AllowedFences,
    MergeGroup,
    MergeWeights,
    OuterStep,
    PublishVersion,
    ReduceGradients,
    ReleaseVersion,
    RestoreWeights,
    SavedWeights,
    SaveWeights,
    ServingRule,
)
from shared.schedule import BY_DEFAULT, Feeding
from shared.telemetry import Telemetry
from tests.support.recording import Recorded, recording_executors
from tests.support.training import LEARNING_RATE

DEADLINE_S = 60.0
KV_TOKENS = 16384
"""Unless told otherwise: on a GPU each node of a test would take all the memory."""


class Answer:
    """The answer to one request."""

    def __init__(self, task: InferenceTask) -> None:
        self.task = task
        self.prompt: list[TokenLogprob] = []
        self.tokens: list[TokenLogprob] = []
        self.finish: str | None = None
        self.failure: TaskFailed | None = None
        self.versions: list[int] = []
        self.num_cached = 0
        """Prompt tokens that others had computed before."""
        self.begun = asyncio.Event()
        self.done = asyncio.Event()

    async def first_token(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.begun.wait()

    async def end(self) -> None:
        """The whole answer, or its failure."""
        async with asyncio.timeout(DEADLINE_S):
            await self.done.wait()

    @property
    def token_ids(self) -> list[int]:
        return [token.token for token in self.tokens]


async def allow_fence(bus: Bus, fence: int) -> None:
    """As the trainer does before a restore: stages may follow this fence, and smaller ones."""
    lease = await bus.read_lease(subjects.TRAINER_LEASE)
    before = AllowedFences.unpack(lease.body).last if lease and lease.body else 0
    revision = lease.revision if lease else await bus.next_fence(subjects.TRAINER_LEASE)
    allowed = AllowedFences(first=1, last=max(fence, before))
    await bus.write_lease(subjects.TRAINER_LEASE, allowed.pack(), revision=revision)


class Node:
    """Plays the gateway, the scheduler and the trainer for one pipeline."""

    workers: "Workers"
    """Its processes, where this one plays them."""

    def __init__(self, bus: Bus, num_stages: int, *, number: int = 0) -> None:
        self.bus = bus
        self.number = number
        self.gateway = f"test-{number}"
        self.num_stages = num_stages
        self.heartbeats: dict[int, Heartbeat] = {}
        self.reports: asyncio.Queue[StageReport] = asyncio.Queue()
        self.orders_steps = True
        """Have stages step as soon as all have a batch's gradients; else `reports` has stage 0's question."""
        self.served: VersionsServed | None = None
        """Stage 0's last report of the versions that it serves."""
        self.keeps = False
        """Have stages keep every version that they step to, or hold after a merge."""
        self.learning_rate = LEARNING_RATE
        self.version = 0
        """The version of the weights after the last step that was ordered."""
        self.fence = 0
        """That of the last restore."""
        self._beaten = asyncio.Condition()
        self._answers: dict[str, Answer] = {}
        self._numbers = itertools.count()

    async def subscribe(self) -> None:
        await self.bus.subscribe(subjects.TOKENS.at(gateway=self.gateway), self._on_tokens)
        await self.bus.subscribe(subjects.FAILED.at(gateway=self.gateway), self._on_failed)
        await self.bus.subscribe(subjects.HEARTBEAT.at(), self._on_heartbeat)
        await self.bus.subscribe(subjects.REPORT.at(), self._on_report)

    async def ready(self, *, timeout_s: float = DEADLINE_S) -> None:
        """Wait until every stage says that it is ready, and the first that the node is whole."""
        await self.heard(
            lambda: (
                len(self.heartbeats) == self.num_stages
                and all(beat.ready for beat in self.heartbeats.values())
                and self.heartbeats[0].whole
            ),
            timeout_s=timeout_s,
        )

    async def heard(self, what: Callable[[], bool], *, timeout_s: float = DEADLINE_S) -> None:
        """Wait until the latest heartbeats of the stages fulfil `what`."""
        async with asyncio.timeout(timeout_s), self._beaten:
            await self._beaten.wait_for(what)

    async def replace(self, stage: int) -> None:
        """Stop the process of a first stage, start another; returns at its first heartbeat, not ready yet."""
        gone = self.heartbeats[stage].instance
        await asyncio.wait([self.workers.stop(stage)])
        self.workers.start(stage)
        await self.heard(lambda: self.heartbeats[stage].instance != gone)

    @property
    def versions(self) -> dict[tuple[int, str, int], int]:
        """(stage, batch, microbatch) -> weights version of its forward."""
        return self.workers.recorded.versions

    @property
    def squared_norms(self) -> dict[str, float]:
        """The squared norm of each batch's gradients over all stages."""
        return {name: sum(each.values()) for name, each in self.workers.recorded.squared_norms.items()}

    @property
    def num_remembered(self) -> int:
        """Sequences that the last stage still knows."""
        return len(self.workers.workers[self.num_stages - 1]._serving.sequences)

    async def cancel(self, answer: Answer) -> None:
        await self.bus.publish(subjects.CANCEL.at(node=self.number), CancelTask(task_id=answer.task.task_id))

    async def start(
        self,
        prompt: list[int],
        *,
        prompt_logprobs: bool = False,
        timeout_s: float = DEADLINE_S,
        changes: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> Answer:
        """Send a request, `changes` made to it; its answer grows."""
        task_id = f"task-{next(self._numbers)}"
        task = InferenceTask(
            task_id=task_id,
            gateway=self.gateway,
            prompt=tuple(prompt),
            sampling=Sampling(**{"temperature": 0.0, **sampling}),
            prompt_logprobs=prompt_logprobs,
            timeout_s=timeout_s,
        )
        task = structs.replace(task, **(changes or {}))
        answer = self._answers[task_id] = Answer(task)
        await self.bus.publish(subjects.ASSIGN.at(node=self.number), task)
        return answer

    async def complete(self, prompt: list[int], **arguments: Any) -> Answer:
        """Send a request and wait for its whole answer."""
        answer = await self.start(prompt, **arguments)
        await answer.end()
        return answer

    async def restore(
        self,
        *,
        fence: int = 1,
        version: int = 0,
        checkpoint: str = "",
        digest: str = "",
        serving: ServingRule = "newest",
        served: SavedWeights | None = None,
        feeding: Feeding = BY_DEFAULT,
    ) -> None:
        """As the trainer does at its start: opens the node for training."""
        weights = SavedWeights(version=version, checkpoint=checkpoint, digest=digest)
        message = RestoreWeights(
            fence=fence, weights=weights, serving=serving, served=served, feeding=feeding
        )
        await allow_fence(self.bus, fence)
        await self.order_restore(message)

    async def order_restore(self, message: RestoreWeights) -> None:
        """The same, whether a lease allows it or not."""
        for stage in range(self.num_stages):
            await self.bus.request(
                subjects.RESTORE.at(node=self.number, stage=stage), message, timeout_s=DEADLINE_S
            )
        self.fence, self.version = message.fence, message.weights.version

    async def save(self, version: int, folder: Path, *, fence: int = 1) -> None:
        message = SaveWeights(fence=fence, version=version, folder=str(folder))
        for stage in range(self.num_stages):
            await self.bus.request(
                subjects.SAVE.at(node=self.number, stage=stage), message, timeout_s=DEADLINE_S
            )

    async def merge(
        self, group: MergeGroup, version: int, outer: OuterStep | None = None, *, fence: int | None = None
    ) -> None:
        """Have all stages hold the mean. Raises the first refusal."""
        order = MergeWeights(
            fence=fence or self.fence, version=version, keep=self.keeps, group=group, outer=outer
        )
        async with asyncio.timeout(DEADLINE_S):
            asked = (
                self.bus.request(
                    subjects.MERGE.at(node=self.number, stage=stage), order, timeout_s=DEADLINE_S
                )
                for stage in range(self.num_stages)
            )
            await asyncio.gather(*asked)
        self.version = version

    async def reduce(self, group: MergeGroup, batch_id: str) -> None:
        order = ReduceGradients(fence=self.fence, batch_id=batch_id, group=group)
        for stage in range(self.num_stages):
            await self.bus.publish(subjects.REDUCE.at(node=self.number, stage=stage), order)

    async def publish(self, version: int) -> None:
        await self.bus.publish(
            subjects.PUBLISH.at(node=self.number), PublishVersion(fence=self.fence, version=version)
        )

    async def release(self, version: int) -> None:
        message = ReleaseVersion(fence=self.fence, version=version)
        for stage in range(self.num_stages):
            await self.bus.publish(subjects.RELEASE.at(node=self.number, stage=stage), message)

    async def until_published(self, version: int) -> None:
        """Wait until stage 0 tells that new requests get the version."""
        await self.heard(lambda: self.served is not None and self.served.published == version)

    async def serves(self, published: int, *in_use: int) -> None:
        """Wait until stage 0 tells that it serves just these versions."""
        wanted = VersionsServed(published=published, in_use=in_use)
        await self.heard(lambda: self.served == wanted)

    async def feed(self, forward: MicrobatchForward) -> None:
        await self.bus.publish(subjects.FORWARD.at(node=self.number, stage=0), forward)

    async def report(self) -> StageReport:
        async with asyncio.timeout(DEADLINE_S):
            return await self.reports.get()

    async def next(self, kind: type[Message]) -> StageReport:
        """The next report of that kind, of any stage."""
        while True:
            report = await self.report()
            assert not isinstance(report.event, TrainingFailed | SaveFailed), report.event
            if isinstance(report.event, kind):
                return report

    async def told(self, kind: type[Message]) -> list[StageReport]:
        """The next report of that kind of every stage, by stage."""
        reports: dict[int, StageReport] = {}
        while len(reports) < self.num_stages:
            report = await self.next(kind)
            reports[report.stage] = report
        return [reports[stage] for stage in range(self.num_stages)]

    async def _on_tokens(self, incoming: Incoming[TokensProduced]) -> None:
        for result in incoming.message.results:
            answer = self._answers[result.task_id]
            answer.prompt.extend(result.prompt)
            if result.token is not None:
                answer.tokens.append(result.token)
                answer.versions.append(incoming.message.weights_version)
                answer.num_cached += result.num_cached
                answer.begun.set()
            if result.finish is not None:
                answer.finish = result.finish
                answer.done.set()

    async def _on_failed(self, incoming: Incoming[TaskFailed]) -> None:
        answer = self._answers[incoming.message.task_id]
        assert answer.failure is None, "an answer fails once"
        answer.failure = incoming.message
        answer.done.set()

    async def _on_heartbeat(self, incoming: Incoming[Heartbeat]) -> None:
        if incoming.message.node != self.number:
            return
        async with self._beaten:
            self.heartbeats[incoming.message.stage] = incoming.message
            self._beaten.notify_all()

    async def order(self, fence: int, batch_id: str, **changes: Any) -> None:
        """Have every stage step on the batch, as the trainer orders when stage 0 asks."""
        self.version += 1
        order = StepOrder(
            fence=fence,
            batch_id=batch_id,
            version=self.version,
            learning_rate=self.learning_rate,
            keep=self.keeps,
        )
        order = structs.replace(order, **changes)
        await self.bus.publish(subjects.STEP.at(node=self.number, stage=0), order)

    async def step_ahead(self, batch_id: str, *, version: int, max_gradient_norm: float | None) -> None:
        """Give the step before the gradients are there."""
        message = StepAhead(
            fence=self.fence,
            batch_id=batch_id,
            version=version,
            learning_rate=self.learning_rate,
            max_gradient_norm=max_gradient_norm,
        )
        await self.bus.publish(subjects.STEP_AHEAD.at(node=self.number), message)

    async def _on_report(self, incoming: Incoming[StageReport]) -> None:
        report = incoming.message
        if report.node != self.number:
            return
        if isinstance(report.event, VersionsServed):
            async with self._beaten:
                self.served = report.event
                self._beaten.notify_all()
            return
        if not (self.orders_steps and isinstance(report.event, BatchReady)):
            self.reports.put_nowait(report)
        elif report.fence == self.fence:
            await self.order(report.fence, report.event.batch_id)


@asynccontextmanager
async def running_node(
    model: Path,
    num_stages: int,
    run_dir: Path,
    *,
    number: int = 0,
    broker: MemoryBroker | None = None,
    clock: Clock | None = None,
    **settings: Any,
) -> AsyncIterator[Node]:
    """A ready node of `num_stages` stages; ends without leaving anything behind.

    Each of its processes holds `stages_held` stages, the last one what is left.
    """
    async with asyncio.TaskGroup() as group:
        chosen = {"num_stages": num_stages, "model": str(model), "run_dir": run_dir, "shm_dir": run_dir}
        chosen |= {"kv_tokens": KV_TOKENS}
        workers = Workers(
            group,
            {**chosen, **settings},
            node=number,
            broker=broker or MemoryBroker(),
            clock=clock or SystemClock(),
        )
        node = Node(workers.broker.connect(), num_stages, number=number)
        node.workers = workers
        await node.subscribe()
        first_stages = range(0, num_stages, settings.get("stages_held", 1))
        for stage in first_stages:
            node.workers.start(stage)
        try:
            await node.ready()
            yield node
        finally:
            for stage in first_stages:
                node.workers.stop(stage)
    await node.bus.close()


@asynccontextmanager
async def running_nodes(
    count: int, *args: Any, of_each: Sequence[dict[str, Any]] = (), **settings: Any
) -> AsyncIterator[list[Node]]:
    """Nodes on one bus, otherwise as `running_node` has one; `of_each`: settings that only one has."""
    broker = MemoryBroker()
    async with AsyncExitStack() as stack:
        nodes = []
        for number, own in enumerate(of_each or [{}] * count):
            node = running_node(*args, number=number, broker=broker, **settings | own)
            nodes.append(await stack.enter_async_context(node))
        yield nodes


class Workers:
    """The stage worker processes of a node; one that fails fails the test."""

    def __init__(
        self,
        group: asyncio.TaskGroup,
        settings: dict[str, Any],
        *,
        node: int,
        broker: MemoryBroker,
        clock: Clock,
    ) -> None:
        self.node = node
        self._clock = clock
        self.broker = broker
        self.recorded = Recorded()
        self.buses: dict[int, MemoryBus] = {}
        """The bus of each process, by its first stage."""
        self.workers: dict[int, StageWorker] = {}
        self._group = group
        self._settings = settings
        self.settings_of: dict[int, dict[str, Any]] = {}
        """Settings of the next process alone whose first stage it is."""
        self._ids = IdSource(random.Random(node))
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def start(self, stage: int) -> None:
        """Start the process whose first stage it is."""
        self._tasks[stage] = self._group.create_task(self._run(stage))

    def stop(self, stage: int) -> asyncio.Task[None]:
        self._tasks[stage].cancel()
        return self._tasks[stage]

    async def _run(self, stage: int) -> None:
        settings = StageWorkerSettings(
            node=self.node, stage=stage, **self._settings | self.settings_of.get(stage, {})
        )
        stages = [own for own in settings.of_stages if own.stage < own.num_stages]
        bus = self.buses[stage] = self.broker.connect()
        telemetry = Telemetry("stage_worker", None)
        world = World(bus=bus, clock=self._clock, ids=self._ids, telemetry=telemetry)
        process = StageProcess(stages, world, recording_executors(self.recorded))
        self.workers |= process.workers
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(process.run())
                group.create_task(bus.wait_failed())
        finally:
            await bus.close()
