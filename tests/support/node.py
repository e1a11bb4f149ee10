"""One node of real stage workers with torch executors, in this process, on the memory bus."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from services.stage_worker.executor.torch import TorchExecutor
from services.stage_worker.service import StageWorker
from services.stage_worker.settings import StageWorkerSettings
from shared import subjects
from shared.bus.base import Bus, Incoming
from shared.bus.memory import MemoryBroker
from shared.clock import IdSource, SystemClock
from shared.messages.cluster import Heartbeat
from shared.messages.inference import InferenceTask, Sampling, TaskFailed, TokenLogprob, TokensProduced
from shared.messages.training import MicrobatchForward, StageReport
from shared.messages.weights import RestoreWeights, SaveWeights
from shared.telemetry import Telemetry

DEADLINE_S = 60.0
GATEWAY = "test"


class Answer:
    """What came back for one request."""

    def __init__(self) -> None:
        self.prompt: list[TokenLogprob] = []
        self.tokens: list[TokenLogprob] = []
        self.finish: str | None = None
        self.failure: TaskFailed | None = None
        self.versions: list[int] = []
        self.done = asyncio.Event()

    @property
    def token_ids(self) -> list[int]:
        return [token.token for token in self.tokens]


class Node:
    """Plays the gateway, the scheduler and the trainer for one pipeline."""

    def __init__(self, bus: Bus, num_stages: int) -> None:
        self.bus = bus
        self.num_stages = num_stages
        self.heartbeats: dict[int, Heartbeat] = {}
        self.reports: asyncio.Queue[StageReport] = asyncio.Queue()
        self._ready = asyncio.Event()
        self._answers: dict[str, Answer] = {}
        self._numbers = itertools.count()

    async def subscribe(self) -> None:
        await self.bus.subscribe(subjects.TOKENS.at(gateway=GATEWAY), self._on_tokens)
        await self.bus.subscribe(subjects.FAILED.at(gateway=GATEWAY), self._on_failed)
        await self.bus.subscribe(subjects.HEARTBEAT.at(), self._on_heartbeat)
        await self.bus.subscribe(subjects.REPORT.at(), self._on_report)

    async def ready(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self._ready.wait()

    async def start(self, prompt: list[int], *, prompt_logprobs: bool = False, **sampling: Any) -> Answer:
        """Send a request; its answer grows."""
        task_id = f"task-{next(self._numbers)}"
        answer = self._answers[task_id] = Answer()
        task = InferenceTask(
            task_id=task_id,
            gateway=GATEWAY,
            prompt=tuple(prompt),
            sampling=Sampling(**{"temperature": 0.0, **sampling}),
            prompt_logprobs=prompt_logprobs,
            timeout_s=DEADLINE_S,
        )
        await self.bus.publish(subjects.ASSIGN.at(node=0), task)
        return answer

    async def complete(self, prompt: list[int], **arguments: Any) -> Answer:
        """Send a request and wait for its whole answer."""
        answer = await self.start(prompt, **arguments)
        async with asyncio.timeout(DEADLINE_S):
            await answer.done.wait()
        return answer

    async def restore(self, *, epoch: int = 1, version: int = 0, checkpoint: str = "") -> None:
        """As the trainer does at its start: opens the node for training."""
        message = RestoreWeights(epoch=epoch, version=version, checkpoint=checkpoint)
        for stage in range(self.num_stages):
            await self.bus.request(subjects.RESTORE.at(node=0, stage=stage), message, timeout_s=DEADLINE_S)

    async def save(self, version: int, folder: Path, *, epoch: int = 1) -> None:
        message = SaveWeights(epoch=epoch, version=version, folder=str(folder))
        for stage in range(self.num_stages):
            await self.bus.request(subjects.SAVE.at(node=0, stage=stage), message, timeout_s=DEADLINE_S)

    async def feed(self, forward: MicrobatchForward) -> None:
        await self.bus.publish(subjects.FORWARD.at(node=0, stage=0), forward)

    async def report(self) -> StageReport:
        async with asyncio.timeout(DEADLINE_S):
            return await self.reports.get()

    async def _on_tokens(self, incoming: Incoming[TokensProduced]) -> None:
        for result in incoming.message.results:
            answer = self._answers[result.task_id]
            answer.prompt.extend(result.prompt)
            if result.token is not None:
                answer.tokens.append(result.token)
                answer.versions.append(incoming.message.weights_version)
            if result.finish is not None:
                answer.finish = result.finish
                answer.done.set()

    async def _on_failed(self, incoming: Incoming[TaskFailed]) -> None:
        answer = self._answers[incoming.message.task_id]
        answer.failure = incoming.message
        answer.done.set()

    async def _on_heartbeat(self, incoming: Incoming[Heartbeat]) -> None:
        self.heartbeats[incoming.message.stage] = incoming.message
        if len(self.heartbeats) == self.num_stages and all(beat.ready for beat in self.heartbeats.values()):
            self._ready.set()

    async def _on_report(self, incoming: Incoming[StageReport]) -> None:
        self.reports.put_nowait(incoming.message)


@asynccontextmanager
async def running_node(model: Path, num_stages: int, run_dir: Path, **settings: Any) -> AsyncIterator[Node]:
    """A ready node of `num_stages` stages; ends without leaving anything behind."""
    broker = MemoryBroker()
    node = Node(broker.connect(), num_stages)
    await node.subscribe()
    async with asyncio.TaskGroup() as group:
        workers = [
            group.create_task(_worker(broker, stage, model, num_stages, run_dir, settings).run())
            for stage in range(num_stages)
        ]
        await node.ready()
        try:
            yield node
        finally:
            for worker in workers:
                worker.cancel()
    await node.bus.close()


def _worker(
    broker: MemoryBroker, stage: int, model: Path, num_stages: int, run_dir: Path, settings: dict[str, Any]
) -> StageWorker:
    chosen = StageWorkerSettings(
        node=0,
        stage=stage,
        num_stages=num_stages,
        model=str(model),
        run_dir=run_dir,
        shm_dir=run_dir,
        **settings,
    )
    instance = IdSource(random.Random(stage)).new("stage")
    return StageWorker(
        settings=chosen,
        instance=instance,
        bus=broker.connect(),
        clock=SystemClock(),
        telemetry=Telemetry("stage_worker", None),
        executor=TorchExecutor(chosen, instance),
    )
