"""The scheduler as its neighbours see it, on the memory bus with a clock that the case moves."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lemix.simulation.loop import run_virtual
from services.scheduler.policies import policy_named
from services.scheduler.service import Scheduler
from services.scheduler.state import LOST_AFTER_S
from shared.bus.base import Incoming
from shared.bus.memory import MemoryBroker
from shared.clock import IdSource
from shared.errors import NoResponderError, RefusedError
from shared.lifecycle import World
from shared.messages.cluster import ClusterStatus, StageStopped, StatusRequest
from shared.messages.inference import InferenceTask, Placed, Sampling, TaskEnded, TaskFailed
from shared.messages.training import TrainingTask
from shared.subjects import ASSIGN, ENDED, FAILED, HEARTBEAT, PLACE, STATUS, STOPPED, SUBMIT
from shared.telemetry import Telemetry
from tests.support.cluster import heartbeat
from tests.support.policies import LinearCosts

TRACE = f"00-{'1' * 32}-{'2' * 16}-01"


class SetClock:
    """Stands still until a case sets it."""

    def __init__(self) -> None:
        self.time_s = 1000.0

    def now_s(self) -> float:
        return self.time_s

    def wall_s(self) -> float:
        return self.time_s


class Cluster:
    """A scheduler, and a bus that plays everybody else."""

    def __init__(self, broker: MemoryBroker, clock: SetClock) -> None:
        self.bus = broker.connect()
        self.clock = clock
        self.assigned: asyncio.Queue[tuple[int, Incoming[InferenceTask]]] = asyncio.Queue()
        self.failed: asyncio.Queue[Incoming[TaskFailed]] = asyncio.Queue()

    async def listen(self) -> None:
        async def on_failed(incoming: Incoming[TaskFailed]) -> None:
            await self.failed.put(incoming)

        await self.bus.subscribe(FAILED.at(gateway="g"), on_failed)
        for node in (0, 1):
            await self._listen_as(node)

    async def _listen_as(self, node: int) -> None:
        async def on_assign(incoming: Incoming[InferenceTask]) -> None:
            await self.assigned.put((node, incoming))

        await self.bus.subscribe(ASSIGN.at(node=node), on_assign)

    async def beat(self, node: int, *, instance: str = "a", ready: bool = True) -> None:
        await self.bus.publish(HEARTBEAT.at(), heartbeat(node, instance=instance, ready=ready))
        await self.status()

    async def submit(self, task_id: str, *, timeout_s: float = 60.0) -> Placed:
        task = InferenceTask(
            task_id=task_id, gateway="g", prompt=(1, 2), sampling=Sampling(max_tokens=4), timeout_s=timeout_s
        )
        return await self.bus.request(SUBMIT.at(), task, timeout_s=5, traceparent=TRACE)

    async def place(self, task_id: str) -> Placed:
        task = TrainingTask(task_id=task_id, microbatch_tokens=(8,))
        return await self.bus.request(PLACE.at(), task, timeout_s=5)

    async def status(self) -> ClusterStatus:
        """Also a barrier: what was published before has been handled."""
        return await self.bus.request(STATUS.at(), StatusRequest(), timeout_s=5)


@asynccontextmanager
async def running(telemetry: Telemetry, policy: str = "round_robin") -> AsyncIterator[Cluster]:
    broker, clock = MemoryBroker(), SetClock()
    cluster = Cluster(broker, clock)
    await cluster.listen()
    bus = broker.connect(traceparent=telemetry.traceparent)
    world = World(bus=bus, clock=clock, ids=IdSource(random.Random(0)), telemetry=telemetry)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(
                Scheduler(world, policy_named(policy, lambda: 0.0), costs=LinearCosts(1)).run()
            ),
            group.create_task(bus.wait_failed()),
        ]
        await until_it_listens(cluster)
        yield cluster
        for task in tasks:
            task.cancel()
    await cluster.bus.close()
    await bus.close()


async def until_it_listens(cluster: Cluster) -> None:
    while True:
        try:
            await cluster.status()
            return
        except NoResponderError:
            await asyncio.sleep(0)


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry("test", None)
    yield telemetry
    telemetry.close()


async def test_a_request_goes_to_the_chosen_node_and_the_gateway_hears_which(telemetry: Telemetry) -> None:
    async with running(telemetry) as cluster:
        await cluster.beat(0)
        await cluster.beat(1)
        assert [(await cluster.submit(f"t{i}")).node for i in range(3)] == [0, 1, 0]
        placed = [await cluster.assigned.get() for _ in range(3)]
        assert [(node, incoming.message.task_id) for node, incoming in placed] == [
            (0, "t0"),
            (1, "t1"),
            (0, "t2"),
        ]
        status = await cluster.status()
        assert status.policy == "round_robin"
        assert [node.inference_tasks for node in status.nodes] == [2, 1]


async def test_without_a_ready_node_the_request_is_refused_with_the_reason(telemetry: Telemetry) -> None:
    async with running(telemetry) as cluster:
        await cluster.beat(0, ready=False)
        with pytest.raises(RefusedError, match=r"no node is ready \(1 known\)") as caught:
            await cluster.submit("t")
        assert caught.value.code == 503
        with pytest.raises(RefusedError, match="no node is ready"):
            await cluster.place("b")


async def test_a_submission_that_arrives_twice_runs_once(telemetry: Telemetry) -> None:
    async with running(telemetry) as cluster:
        await cluster.beat(0)
        await cluster.beat(1)
        assert await cluster.submit("t") == await cluster.submit("t")
        assert await cluster.place("b") == await cluster.place("b")
        await cluster.status()
        assert cluster.assigned.qsize() == 1


async def test_training_is_placed_by_the_same_policy_and_counted(telemetry: Telemetry) -> None:
    async with running(telemetry, "least_loaded") as cluster:
        await cluster.beat(0)
        await cluster.beat(1)
        assert (await cluster.submit("t")).node == 0
        assert (await cluster.place("b")).node == 1
        assert [node.training_tasks for node in (await cluster.status()).nodes] == [0, 1]
        await cluster.bus.publish(ENDED.at(), TaskEnded(task_ids=("t", "b")))
        assert [node.inference_tasks + node.training_tasks for node in (await cluster.status()).nodes] == [
            0,
            0,
        ]


def test_a_silent_node_fails_its_requests(telemetry: Telemetry) -> None:
    async def case() -> None:
        async with running(telemetry) as cluster:
            await cluster.beat(0)
            await cluster.submit("t")
            cluster.clock.time_s += LOST_AFTER_S
            failed = (await cluster.failed.get()).message
            assert (failed.task_id, failed.code) == ("t", 503)
            assert "node 0 was silent" in failed.reason
            with pytest.raises(RefusedError):
                await cluster.submit("t2")

    run_virtual(case())  # the scheduler looks for silence twice in a heartbeat's time


async def test_a_restarted_stage_fails_the_requests_of_its_node(telemetry: Telemetry) -> None:
    async with running(telemetry) as cluster:
        await cluster.beat(0)
        await cluster.submit("t")
        await cluster.beat(0, instance="b")
        assert "restarted" in (await cluster.failed.get()).message.reason


async def test_a_stage_that_leaves_fails_the_requests_of_its_node(telemetry: Telemetry) -> None:
    async with running(telemetry) as cluster:
        await cluster.beat(0)
        await cluster.submit("t")
        await cluster.bus.publish(STOPPED.at(), StageStopped(node=0, stage=0, instance="a"))
        assert "was stopped" in (await cluster.failed.get()).message.reason
        assert (await cluster.status()).nodes == ()


async def test_a_task_whose_end_nobody_reports_leaves_the_count(telemetry: Telemetry) -> None:
    async with running(telemetry) as cluster:
        await cluster.beat(0)
        await cluster.submit("t", timeout_s=1.0)
        for _ in range(4):
            cluster.clock.time_s += 2.0
            await cluster.beat(0)
        assert [node.inference_tasks for node in (await cluster.status()).nodes] == [0]
        assert cluster.failed.empty()


async def test_placing_is_a_span_between_the_gateway_and_stage_0() -> None:
    exporter = InMemorySpanExporter()
    telemetry = Telemetry("test", exporter)
    async with running(telemetry) as cluster:
        await cluster.beat(1)
        await cluster.submit("t")
        _, incoming = await cluster.assigned.get()
    telemetry.close()
    span = span_named("scheduler.place", exporter.get_finished_spans())
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == TRACE.split("-")[2]
    assert f"{span.context.span_id:016x}" == incoming.traceparent.split("-")[2]
    assert dict(span.attributes or {}) == {
        "lemix.task_id": "t",
        "lemix.policy": "round_robin",
        "lemix.node": 1,
    }


def span_named(name: str, spans: tuple[ReadableSpan, ...]) -> ReadableSpan:
    (span,) = [span for span in spans if span.name == name]
    return span
