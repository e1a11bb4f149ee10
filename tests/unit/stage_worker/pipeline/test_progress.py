"""A stage tells what it does: at once when something happens, not too often, and with the right times."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from lemix.simulation.loop import VirtualClock, run_virtual
from services.stage_worker.compute.executor import SequenceChunk
from services.stage_worker.pipeline.device import Turns
from services.stage_worker.pipeline.progress import Progress, iteration_op, microbatch_op, step_op
from shared.bus.base import Incoming
from shared.bus.memory import MemoryBroker
from shared.messages.events import StageOp, StageProgress
from shared.messages.training import Microbatch
from shared.subjects import PROGRESS, PROGRESS_EVERY_S


def chunk(task_id: str, start: int, num_tokens: int, *, produces: bool, index: int = 0) -> SequenceChunk:
    return SequenceChunk(
        task_id=task_id,
        start=start,
        num_tokens=num_tokens,
        blocks=(),
        produces=produces,
        index=index,
    )


def test_an_iteration_is_named_after_the_prompts_that_it_completes() -> None:
    chunks = (
        chunk("decodes", 9, 1, produces=True, index=2),
        chunk("begins", 0, 4, produces=False),
        chunk("completes", 2, 3, produces=True),
    )
    assert iteration_op(7, chunks) == StageOp(
        kind="iteration",
        task_ids=("completes",),
        index=7,
        num_tokens=8,
        num_pairs=10 + (1 + 2 + 3 + 4) + (3 + 4 + 5),
        num_sequences=3,
        num_context_tokens=10 + 4 + 5,
    )


def test_training_ops_are_named_after_their_batch() -> None:
    microbatch = Microbatch(
        fence=1,
        batch_id="b",
        index=1,
        count=2,
        lengths=(2, 3),
        label_rows=(),
        labels=(),
        loss_weight=1.0,
    )
    assert microbatch_op("backward", microbatch) == StageOp(
        kind="backward",
        task_ids=("b",),
        index=1,
        num_tokens=5,
        num_pairs=3 + 6,
        num_sequences=2,
        num_context_tokens=5,
    )
    assert step_op("b").num_tokens == 0


class Told(list[tuple[float, StageProgress]]):
    """(time, message) of all that was told."""

    def __init__(self) -> None:
        super().__init__()
        self._ends: asyncio.Queue[StageProgress] = asyncio.Queue()

    def hear(self, at_s: float, message: StageProgress) -> None:
        self.append((at_s, message))
        if message.ended:
            self._ends.put_nowait(message)

    async def one_with_ends(self) -> StageProgress:
        """The next message that tells of an op's end."""
        async with asyncio.timeout(30):
            return await self._ends.get()


@asynccontextmanager
async def telling() -> AsyncIterator[tuple[Progress, Told]]:
    """A stage's progress, and what is told of it with the time (of a virtual clock, from 0)."""
    broker = MemoryBroker()
    told = Told()
    loop = asyncio.get_running_loop()
    begin_s = loop.time()

    async def on_progress(incoming: Incoming[StageProgress]) -> None:
        told.hear(loop.time() - begin_s, incoming.message)

    listener, bus = broker.connect(), broker.connect()
    await listener.subscribe(PROGRESS.at(), on_progress)
    progress = Progress(node=3, stage=1, turns=Turns(), bus=bus, clock=VirtualClock(loop))
    running = asyncio.create_task(progress.run())
    yield progress, told
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await listener.close()
    await bus.close()


async def do(progress: Progress, batch_id: str, seconds: float) -> None:
    with progress.doing(step_op(batch_id)):
        await asyncio.sleep(seconds)


def ended(message: StageProgress) -> list[tuple[str, float, float]]:
    """(batch, elapsed, ago) in milliseconds."""
    return [
        (each.op.task_ids[0], round(1e3 * each.elapsed_s, 3), round(1e3 * each.ago_s, 3))
        for each in message.ended
    ]


def test_start_and_end_are_told_at_once() -> None:
    async def case() -> None:
        async with telling() as (progress, told):
            await do(progress, "a", 0.1)
            await asyncio.sleep(1.0)
        (begin_s, begin), (end_s, end) = told
        assert (begin_s, end_s) == pytest.approx((0.0, 0.1))
        assert (begin.node, begin.stage, begin.ended) == (3, 1, ())
        assert begin.running is not None and begin.running.op == step_op("a")
        assert (ended(end), end.running) == ([("a", 100.0, 0.0)], None)

    run_virtual(case())


def test_many_short_ops_go_into_few_messages() -> None:
    async def case() -> None:
        async with telling() as (progress, told):
            for index in range(20):
                await do(progress, str(index), 0.001)
            await asyncio.sleep(1.0)
        assert len(told) <= 20 * 0.001 / PROGRESS_EVERY_S + 2
        times_s = [at_s for at_s, _ in told]
        gaps_s = [later - earlier for earlier, later in pairwise(times_s)]
        assert min(gaps_s) >= PROGRESS_EVERY_S - 1e-9
        everything = [each for _, message in told for each in ended(message)]
        assert [(name, elapsed) for name, elapsed, _ in everything] == [(str(i), 1.0) for i in range(20)]
        assert told[1][1].ended[0].ago_s == pytest.approx(PROGRESS_EVERY_S - 0.001)

    run_virtual(case())


def test_an_op_that_was_handed_over_early_starts_when_the_one_before_it_ends() -> None:
    async def case() -> None:
        async with telling() as (progress, told):

            async def second() -> None:
                with progress.doing(step_op("b")):
                    await asyncio.sleep(0.25)  # 0.1 s behind the first one, then 0.15 s of its own

            async with asyncio.TaskGroup() as group:
                group.create_task(do(progress, "a", 0.1))
                group.create_task(second())
            await asyncio.sleep(1.0)
        first, at_turn, last = (message for _, message in told)
        assert first.running is not None and first.running.op.task_ids == ("a",)
        assert at_turn.running is not None and at_turn.running.op.task_ids == ("b",)
        assert at_turn.running.ago_s == pytest.approx(0.0)
        assert ended(at_turn) + ended(last) == [("a", 100.0, 0.0), ("b", 150.0, 0.0)]

    run_virtual(case())


class Time:
    """The time of an op on a device, which is over when the test says so."""

    def __init__(self, seconds: float, *, is_over: bool) -> None:
        self._seconds = seconds
        self.over = threading.Event()
        if is_over:
            self.over.set()

    def is_over(self) -> bool:
        return self.over.is_set()

    def wait_s(self) -> float:
        self.over.wait(30)
        return self._seconds


def test_an_op_took_the_devices_time_where_that_is_known() -> None:
    async def case() -> None:
        async with telling() as (progress, told):
            with progress.doing(step_op("a")) as handed:
                await asyncio.sleep(0.1)
                handed.took = (Time(0.02, is_over=True), Time(0.03, is_over=True))
            await asyncio.sleep(1.0)
        assert ended(told[-1][1]) == [("a", 50.0, 0.0)]

    run_virtual(case())


def test_an_op_beside_a_longer_one_ends_before_it() -> None:
    async def case() -> None:
        async with telling() as (progress, told):
            async with asyncio.TaskGroup() as group:
                group.create_task(do(progress, "long", 0.5))
                await asyncio.sleep(0.1)
                group.create_task(do(progress, "short", 0.1))
            await asyncio.sleep(1.0)
        beside, last = (message for _, message in told if message.ended)
        assert ended(beside) == [("short", 100.0, 0.0)]
        assert beside.running is not None and beside.running.op == step_op("long")
        assert beside.running.ago_s == pytest.approx(0.2)
        assert ended(last) == [("long", 500.0, 0.0)]

    run_virtual(case())


async def test_an_op_that_outlasts_its_call_runs_until_the_device_has_done_it() -> None:
    device = Time(0.125, is_over=False)
    async with telling() as (progress, told):
        with progress.doing(step_op("a")) as handed:
            handed.took = (device,)
        with progress.doing(step_op("b")) as handed:
            handed.took = (Time(0.25, is_over=True),)
        first = await told.one_with_ends()
        assert first.running is not None and first.running.op == step_op("a"), "it was launched only"
        device.over.set()
        second = await told.one_with_ends()
    assert [each[:2] for message in (first, second) for each in ended(message)] == [
        ("b", 250.0),
        ("a", 125.0),
    ]


def test_an_op_that_fails_has_no_end_but_runs_no_more() -> None:
    async def case() -> None:
        async with telling() as (progress, told):
            with pytest.raises(ValueError), progress.doing(step_op("a")):
                await asyncio.sleep(0.1)
                raise ValueError
            await asyncio.sleep(1.0)
        assert [(ended(message), message.running is None) for _, message in told] == [([], False), ([], True)]

    run_virtual(case())


async def give_way(progress: Progress) -> None:
    """An op of two slices of 1 s each, and an iteration of 0.5 s between them."""
    with progress.doing(step_op("sliced")) as handed:
        await asyncio.sleep(1.0)
        with (
            progress.standing_aside(handed),
            progress.doing(iteration_op(7, (chunk("a", 0, 1, produces=True),))),
        ):
            await asyncio.sleep(0.5)
        await asyncio.sleep(1.0)


def test_an_op_that_stood_aside_is_told_of_without_what_ran_meanwhile() -> None:
    async def tell() -> list[tuple[float, StageProgress]]:
        async with telling() as (progress, told):
            await give_way(progress)
            await asyncio.sleep(1.0)
        return told

    told = run_virtual(tell())
    by_time = {round(at_s, 3): progress for at_s, progress in told}
    aside, running = by_time[1.0].aside, by_time[1.0].running
    assert aside is not None and aside.op == step_op("sliced")
    assert (aside.ago_s, aside.given_way_s) == pytest.approx((1.0, 0.0))
    assert running is not None and running.op.kind == "iteration" and running.ago_s == 0.0
    (iteration,), again = by_time[1.5].ended, by_time[1.5].running
    assert iteration.op.index == 7
    assert (iteration.elapsed_s, iteration.given_way_s) == pytest.approx((0.5, 0.0))
    assert by_time[1.5].aside is None
    assert again is not None and (again.ago_s, again.given_way_s) == pytest.approx((1.5, 0.5))
    (op,) = by_time[2.5].ended
    assert (op.elapsed_s, op.given_way_s) == pytest.approx((2.0, 0.5))
