"""The order of a stage's local queue."""

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from services.stage_worker.pipeline.disciplines import DISCIPLINES, SloFirst, WorkKind, fifo
from services.stage_worker.pipeline.queue import WorkQueue
from shared.clock import SystemClock
from shared.errors import LemixError
from shared.slices import TRAINING_TURN


@dataclass(frozen=True)
class Item:
    kind: WorkKind
    since_s: float = 0.0


CONTROL, INFERENCE, STEP, BACKWARD, FORWARD, DEFERRABLE = (Item(kind) for kind in WorkKind)


def order(discipline: str, items: list[Item], *, now_s: float = 0.0) -> list[Item]:
    """The items as the discipline would work them off."""
    choose, waiting = DISCIPLINES[discipline](0.5), list(items)
    return [waiting.pop(choose(waiting, now_s, None)) for _ in items]


def test_fifo_keeps_the_order_of_arrival() -> None:
    items = [FORWARD, INFERENCE, BACKWARD, CONTROL]
    assert order("fifo", items) == items
    assert fifo(items, 100.0) == 0


def test_slo_first_prefers_control_inference_step_backward_forward_deferrable() -> None:
    items = [DEFERRABLE, FORWARD, BACKWARD, STEP, INFERENCE, CONTROL]
    assert order("slo_first", items) == [CONTROL, INFERENCE, STEP, BACKWARD, FORWARD, DEFERRABLE]


@pytest.mark.parametrize(
    ("after", "expected"),
    [(None, BACKWARD), (WorkKind.TRAINING_FORWARD, BACKWARD), (WorkKind.BACKWARD, FORWARD)],
)
def test_slo_first_lets_a_forward_go_first_after_a_backward(after: WorkKind | None, expected: Item) -> None:
    items = [DEFERRABLE, BACKWARD, FORWARD]
    assert items[SloFirst(patience_s=0.5)(items, 0.0, after)] == expected
    assert SloFirst(patience_s=0.5)([*items, STEP], 0.0, after) == 3


def test_slo_first_keeps_the_order_of_arrival_within_a_kind() -> None:
    items = [Item(WorkKind.INFERENCE, since_s) for since_s in (0.1, 0.2, 0.3)]
    assert order("slo_first", items, now_s=0.4) == items


@pytest.mark.parametrize(("now_s", "expected"), [(0.49, 1), (0.5, 0), (9.0, 0)])
def test_slo_first_lets_training_that_waited_long_go_first(now_s: float, expected: int) -> None:
    assert SloFirst(patience_s=0.5)([FORWARD, INFERENCE], now_s) == expected


def test_slo_first_has_no_patience_for_inference() -> None:
    assert SloFirst(patience_s=0.5)([INFERENCE, Item(WorkKind.CONTROL, 9.0)], 9.0) == 1


def test_overdue_backwards_and_forwards_go_as_they_came() -> None:
    items = [FORWARD, BACKWARD, INFERENCE]
    assert order("slo_first", items, now_s=1.0) == items


async def test_the_queue_works_off_what_it_has_one_by_one() -> None:
    queue, log, all_done = WorkQueue(SystemClock(), SloFirst(60.0), max_items=8), list[str](), asyncio.Event()

    async def work(name: str) -> None:
        log.append(name)
        if name == "forward":
            all_done.set()
        elif name == "first":
            queue.put(WorkKind.INFERENCE, partial(work, "inference"))

    queue.put(WorkKind.CONTROL, partial(work, "first"))
    queue.put(WorkKind.TRAINING_FORWARD, partial(work, "forward"))
    queue.put(WorkKind.BACKWARD, partial(work, "backward"))
    running = asyncio.create_task(queue.run())
    await all_done.wait()
    assert log == ["first", "inference", "backward", "forward"]
    assert len(queue) == 0
    running.cancel()


async def test_backwards_and_forwards_take_turns_and_iterations_between_them_do_not_count() -> None:
    queue, log, all_done = WorkQueue(SystemClock(), SloFirst(60.0), max_items=8), list[str](), asyncio.Event()

    async def work(name: str) -> None:
        log.append(name)
        if name == "backward 0":
            queue.put(WorkKind.INFERENCE, partial(work, "inference"))
        elif name == "backward 2":
            all_done.set()

    for number in range(3):
        queue.put(WorkKind.BACKWARD, partial(work, f"backward {number}"))
    for number in range(2):
        queue.put(WorkKind.TRAINING_FORWARD, partial(work, f"forward {number}"))
    running = asyncio.create_task(queue.run())
    await all_done.wait()
    assert log == ["backward 0", "inference", "forward 0", "backward 1", "forward 1", "backward 2"]
    running.cancel()


async def test_an_error_of_an_item_ends_the_queue() -> None:
    async def fail() -> None:
        raise LemixError("broken")

    queue = WorkQueue(SystemClock(), fifo, max_items=8)
    queue.put(WorkKind.CONTROL, fail)
    with pytest.RaisesGroup(pytest.RaisesExc(LemixError, match="broken")):
        await queue.run()


async def test_a_full_queue_says_so() -> None:
    async def nothing() -> None:
        pass

    queue = WorkQueue(SystemClock(), fifo, max_items=1)
    queue.put(WorkKind.INFERENCE, nothing)
    with pytest.raises(LemixError, match="1 items of work"):
        queue.put(WorkKind.INFERENCE, nothing)


class Sliced:
    """An op of four slices of a second each, and iterations that come meanwhile; only they move the clock."""

    def __init__(self) -> None:
        self.s = 0.0
        self.log: list[tuple[str, float]] = []
        """What has ended, and when."""
        self.queue = WorkQueue(self, SloFirst(60.0), max_items=8)
        self._done = asyncio.Event()

    def now_s(self) -> float:
        return self.s

    def wall_s(self) -> float:
        return self.s

    def come(self, name: str, seconds: float, training_turn: float = TRAINING_TURN) -> None:
        work = partial(self._iterate, name, seconds)
        self.queue.put(WorkKind.INFERENCE, work, training_turn=training_turn)

    async def _iterate(self, name: str, seconds: float) -> None:
        self.s += seconds
        self.log.append((name, self.s))

    async def _op(self, coming: list[tuple[Any, ...]]) -> None:
        for place in range(4):
            if place and self.queue.must_give_way:
                await self.queue.give_way()
            self.s += 1.0
            if coming:
                self.come(*coming.pop(0))
        self.log.append(("op", self.s))
        self._done.set()

    async def run(self, *coming: tuple[Any, ...]) -> list[tuple[str, float]]:
        """One iteration comes in each slice; returns when the op has ended."""
        self.queue.put(WorkKind.BACKWARD, partial(self._op, list(coming)), gives_way=True)
        running = asyncio.create_task(self.queue.run())
        await self._done.wait()
        running.cancel()
        return self.log


async def test_an_iteration_goes_first_between_two_slices() -> None:
    assert await Sliced().run(("first", 0.25)) == [("first", 1.25), ("op", 4.25)]


async def test_what_waits_before_an_op_begins_goes_before_it() -> None:
    it = Sliced()
    it.come("before", 0.5)
    assert await it.run() == [("before", 0.5), ("op", 4.5)]


async def test_an_op_goes_on_for_two_lengths_of_an_iteration_before_it_gives_way_again() -> None:
    log = await Sliced().run(("first", 0.6), ("second", 0.1))
    assert [name for name, _ in log] == ["first", "second", "op"]
    assert [at_s for _, at_s in log] == pytest.approx([1.6, 3.7, 4.7])


@pytest.mark.parametrize(("training_turn", "second_s"), [(0.0, 2.7), (1.0, 2.7), (3.0, 3.7), (9.0, 4.7)])
async def test_an_op_goes_on_for_as_long_as_the_iteration_before_says(
    training_turn: float, second_s: float
) -> None:
    """Its slices end at 2.6, 3.6 and 4.6 s, and it with the last."""
    log = await Sliced().run(("first", 0.6, training_turn), ("second", 0.1))
    assert dict(log)["second"] == pytest.approx(second_s)


async def test_an_iteration_that_fails_in_the_middle_of_an_op_ends_the_queue() -> None:
    queue, failed = WorkQueue(SystemClock(), SloFirst(60.0), max_items=8), list[LemixError]()

    async def fail() -> None:
        raise LemixError("broken")

    async def op() -> None:
        try:
            queue.put(WorkKind.INFERENCE, fail)
            await queue.give_way()
        except LemixError as error:
            failed.append(error)

    queue.put(WorkKind.BACKWARD, op, gives_way=True)
    with pytest.RaisesGroup(pytest.RaisesExc(LemixError, match="broken")):
        await queue.run()
    assert not failed, "it would pass for a failure of the training"
