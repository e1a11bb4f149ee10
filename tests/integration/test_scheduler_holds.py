"""Tasks that must wait are held by the scheduler, in virtual time, until they may run or their time is up."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from msgspec import structs

from lemix.simulation.loop import VirtualClock, run_virtual
from services.gateway.cluster_client import SUBMIT_TIMEOUT_S, ClusterClient
from services.gateway.sent_sequence import SequenceSpec
from services.scheduler.objectives import DEFAULT_OBJECTIVES, Objectives
from services.scheduler.policies.base import Arrival, Decision, Place, Refuse, Wait
from services.scheduler.service import HOLD_S, Scheduler
from services.scheduler.state import ClusterState
from services.trainer.intake.batch_flow import PLACE_TIMEOUT_S
from shared.bus.base import Incoming
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.clock import IdSource
from shared.errors import RefusedError
from shared.lifecycle import World
from shared.messages.cluster import StatusRequest
from shared.messages.events import OpEnded, StageOp, StageProgress
from shared.messages.inference import DEFERRED, InferenceTask, Objective, Placed, Sampling
from shared.messages.training import TrainingTask
from shared.subjects import ASSIGN, HEARTBEAT, PLACE, PROGRESS, STATUS, SUBMIT
from shared.telemetry import NoTelemetry
from tests.support.cluster import heartbeat
from tests.support.policies import LinearCosts, request

BATCH = TrainingTask(task_id="b", microbatch_tokens=(8,))


class Scripted:
    """Decides by a function of (now, since when the task waits)."""

    name = "scripted"

    def __init__(self, decide: Callable[[float, float], Decision]) -> None:
        self._decide = decide
        self.asked_s: list[float] = []

    def choose(self, state: ClusterState, arrival: Arrival, now_s: float) -> Decision:
        self.asked_s.append(now_s)
        return self._decide(now_s, arrival.arrived_s)


class OneAfterAnother(Scripted):
    """Places the first in line once a node is free; the others wait behind it."""

    def __init__(self, free_s: float) -> None:
        super().__init__(lambda now_s, _: Place(0))
        self._free_s = free_s

    def choose(self, state: ClusterState, arrival: Arrival, now_s: float) -> Decision:
        self.asked_s.append(now_s)
        if state.waiting_line.first not in (None, arrival.task.task_id):
            return Wait(float("inf"), "late", in_line=True)
        return Place(0) if now_s >= self._free_s else Wait(self._free_s, "late", in_line=True)


@asynccontextmanager
async def scheduling(
    policy: Scripted, objectives: Objectives = DEFAULT_OBJECTIVES
) -> AsyncIterator[MemoryBus]:
    """A scheduler with one ready node; the bus of everybody else."""
    broker = MemoryBroker()
    bus, own = broker.connect(), broker.connect()
    world = World(
        bus=own,
        clock=VirtualClock(asyncio.get_running_loop()),
        ids=IdSource(random.Random(0)),
        telemetry=NoTelemetry(),
    )
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(Scheduler(world, policy, costs=LinearCosts(1), objectives=objectives).run()),
            group.create_task(own.wait_failed()),
            group.create_task(beat(bus)),
        ]
        await asyncio.sleep(0.1)
        yield bus
        for task in tasks:
            task.cancel()
    await bus.close()
    await own.close()


async def beat(bus: MemoryBus) -> None:
    while True:
        await bus.publish(HEARTBEAT.at(), heartbeat(0))
        await asyncio.sleep(0.05)


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_a_task_is_held_until_it_may_run() -> None:
    policy = Scripted(lambda now_s, _: Place(0, offload=True) if now_s >= 2.0 else Wait(now_s + 0.5, "x"))

    async def case() -> None:
        async with scheduling(policy) as bus:
            placed = await bus.request(PLACE.at(), BATCH, timeout_s=PLACE_TIMEOUT_S)
            assert placed == Placed(node=0, offload=True)
            assert now_s() == pytest.approx(2.1)
            assert len(policy.asked_s) == 5

    run_virtual(case())


def test_a_task_that_comes_twice_while_it_is_held_runs_once() -> None:
    policy = Scripted(lambda now_s, _: Place(0) if now_s >= 1.0 else Wait(now_s + 0.3, "x"))
    assigned: list[str] = []

    async def on_assign(incoming: Incoming[InferenceTask]) -> None:
        assigned.append(incoming.message.task_id)

    async def case() -> None:
        async with scheduling(policy) as bus:
            await bus.subscribe(ASSIGN.at(node=0), on_assign)
            task = request("r", 4)
            both = (bus.request(SUBMIT.at(), task, timeout_s=SUBMIT_TIMEOUT_S) for _ in range(2))
            first, second = await asyncio.gather(*both)
            assert first == second
            await asyncio.sleep(0.1)

    run_virtual(case())
    assert assigned == ["r"]


def test_a_batch_that_may_not_run_yet_is_told_to_ask_again_and_its_wait_is_remembered() -> None:
    waited_s: list[float] = []

    def decide(now_s: float, arrived_s: float) -> Decision:
        waited_s.append(now_s - arrived_s)
        return Wait(now_s + 1.0, "requests would be late") if now_s - arrived_s < 3.5 else Place(0)

    async def case() -> None:
        async with scheduling(Scripted(decide)) as bus:
            with pytest.raises(RefusedError, match=f"^{DEFERRED}: requests would be late") as caught:
                await bus.request(PLACE.at(), BATCH, timeout_s=PLACE_TIMEOUT_S)
            assert caught.value.code == 503
            assert now_s() == pytest.approx(0.1 + HOLD_S["training"])
            await bus.request(PLACE.at(), BATCH, timeout_s=PLACE_TIMEOUT_S)
            assert now_s() == pytest.approx(4.1)

    run_virtual(case())
    assert max(waited_s) == pytest.approx(4.0)


def test_whoever_asks_waits_longer_than_the_scheduler_holds() -> None:
    assert HOLD_S["training"] < PLACE_TIMEOUT_S
    assert HOLD_S["inference"] < SUBMIT_TIMEOUT_S


def test_a_policy_that_names_a_time_in_the_past_does_not_spin() -> None:
    policy = Scripted(lambda now_s, _: Wait(0.0, "x"))

    async def case() -> None:
        async with scheduling(policy) as bus:
            with pytest.raises(RefusedError):
                await bus.request(PLACE.at(), BATCH, timeout_s=PLACE_TIMEOUT_S)

    run_virtual(case())
    assert 10 < len(policy.asked_s) <= HOLD_S["training"] / 0.001 + 2


def test_who_asks_is_told_when_tokens_are_due_or_when_to_come_again() -> None:
    late = Refuse(429, "late", retry_after_s=1.5)
    policy = Scripted(lambda now_s, arrived_s: late if arrived_s > 0.15 else Place(0))
    own = Objective(ttft_s=2.0, tbt_s=0.5)

    async def case() -> None:
        async with scheduling(policy, Objectives(ttft_s=1.0, ttft_per_token_s=0.125)) as bus:
            tasks = [request("r", 4), structs.replace(request("s", 4), objective=own)]
            answers = [await bus.request(SUBMIT.at(), task, timeout_s=1.0) for task in tasks]
            assert answers == [Placed(node=0, ttft_s=1.5), Placed(node=0, ttft_s=2.0, tbt_s=0.5)]
            await asyncio.sleep(0.1)
            with pytest.raises(RefusedError, match="late") as refused:
                await bus.request(SUBMIT.at(), request("t", 4), timeout_s=1.0)
            assert (refused.value.code, refused.value.retry_after_s) == (429, 1.5)
            assert (await bus.request(STATUS.at(), StatusRequest(), timeout_s=1.0)).num_refused == 1

    run_virtual(case())


def test_the_time_that_a_request_spent_at_its_gateway_counts() -> None:
    waited_s: list[float] = []

    def decide(now_s: float, arrived_s: float) -> Decision:
        waited_s.append(now_s - arrived_s)
        return Place(0)

    async def case() -> None:
        async with scheduling(Scripted(decide)) as bus:
            task = structs.replace(request("r", 4), waited_s=0.5)
            await bus.request(SUBMIT.at(), task, timeout_s=1.0)

    run_virtual(case())
    assert waited_s == [pytest.approx(0.5)]


def test_held_tasks_do_not_hold_up_those_behind_them() -> None:
    class LargeOnesWait(Scripted):
        def choose(self, state: ClusterState, arrival: Arrival, now_s: float) -> Decision:
            is_small = isinstance(arrival.task, InferenceTask) and len(arrival.task.prompt) < 100
            return Place(0) if is_small else Wait(now_s + 1.0, "no room")

    async def case() -> None:
        async with scheduling(LargeOnesWait(lambda now_s, _: Place(0))) as bus, asyncio.TaskGroup() as group:
            held = [
                group.create_task(bus.request(SUBMIT.at(), request(f"l{i}", 100), timeout_s=SUBMIT_TIMEOUT_S))
                for i in range(100)
            ]
            await asyncio.sleep(0.1)
            assert (await bus.request(SUBMIT.at(), request("s", 4), timeout_s=0.1)).node == 0
            for task in held:
                task.cancel()

    run_virtual(case())


def test_a_refusal_ends_the_task_at_once() -> None:
    async def case() -> None:
        async with scheduling(Scripted(lambda now_s, _: Refuse(429, "too much"))) as bus:
            with pytest.raises(RefusedError, match=r"^too much$") as caught:
                await bus.request(SUBMIT.at(), request("r", 4), timeout_s=SUBMIT_TIMEOUT_S)
            assert caught.value.code == 429
            assert now_s() == pytest.approx(0.1)

    run_virtual(case())


def test_the_status_tells_how_wrong_forecasts_were() -> None:
    async def case() -> None:
        async with scheduling(Scripted(lambda now_s, _: Place(0))) as bus:
            await bus.request(SUBMIT.at(), request("r", 100), timeout_s=SUBMIT_TIMEOUT_S)
            op = StageOp(
                kind="iteration",
                task_ids=("r",),
                index=0,
                num_tokens=100,
                num_pairs=5050,
                num_sequences=1,
                num_context_tokens=100,
            )
            ended = OpEnded(op=op, elapsed_s=0.125, ago_s=0.0)
            await bus.publish(PROGRESS.at(), StageProgress(node=0, stage=0, ended=(ended,), running=None))
            status = await bus.request(STATUS.at(), StatusRequest(), timeout_s=5)
            assert status.forward_error.count == 1
            assert status.forward_error.mean == pytest.approx(0.2)
            assert status.response_error.count == 0  # the policy had not forecast it
            assert status.slo_s == pytest.approx(5.0 * 0.1)

    run_virtual(case())


def test_a_task_in_line_is_woken_when_its_turn_comes() -> None:
    """Three are late. Each asks once more when the one before it has a node, and not in between."""
    free_s = 3.0
    policy = OneAfterAnother(free_s)

    async def case() -> None:
        async with scheduling(policy) as bus, asyncio.TaskGroup() as group:
            for number in range(3):
                task = request(f"r{number}", 4)
                group.create_task(bus.request(SUBMIT.at(), task, timeout_s=SUBMIT_TIMEOUT_S))
        assert now_s() == pytest.approx(free_s, abs=0.01)

    run_virtual(case())
    assert len(policy.asked_s) == 6


def test_a_task_that_goes_ahead_of_the_first_in_line_is_not_forgotten() -> None:
    """The second one came to its gateway earlier, so it stands before the first, and is asked."""
    free_s = 3.0

    async def case() -> None:
        async with scheduling(OneAfterAnother(free_s)) as bus, asyncio.TaskGroup() as group:
            for task_id, waited_s in (("r", 0.0), ("s", 1.0)):
                task = structs.replace(request(task_id, 4), waited_s=waited_s)
                group.create_task(bus.request(SUBMIT.at(), task, timeout_s=SUBMIT_TIMEOUT_S))
        assert now_s() == pytest.approx(free_s, abs=0.01)

    run_virtual(case())


def test_the_gateway_asks_again_for_a_deferred_request_until_nobody_wants_it() -> None:
    asked = 0

    async def deferring(incoming: Incoming[InferenceTask]) -> Placed:
        nonlocal asked
        asked += 1
        assert incoming.message.waited_s == 0.25
        await asyncio.sleep(HOLD_S["inference"])
        raise RefusedError(f"{DEFERRED}: its first token would come late")

    async def case() -> None:
        broker = MemoryBroker()
        bus, own = broker.connect(), broker.connect()
        await bus.respond(SUBMIT.at(), deferring)
        client = ClusterClient(
            bus=own,
            clock=VirtualClock(asyncio.get_running_loop()),
            ids=IdSource(random.Random(0)),
            telemetry=NoTelemetry(),
            request_timeout_s=60.0,
        )
        async with client.running():
            spec = SequenceSpec(prompt=(1,), sampling=Sampling(max_tokens=1))
            session = client.submit([spec], arrived_s=now_s() - 0.25)
            with pytest.raises(RefusedError) as caught:
                await session.next()
            assert caught.value.code == 504
            session.close()
        await bus.close()
        await own.close()

    run_virtual(case())
    assert asked == 8
