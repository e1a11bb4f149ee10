"""The order of a stage's local queue."""

import asyncio
from dataclasses import dataclass
from functools import partial

import pytest

from services.stage_worker.pipeline.disciplines import DISCIPLINES, SloFirst, WorkKind, fifo
from services.stage_worker.pipeline.queue import WorkQueue
from shared.clock import SystemClock
from shared.errors import LemixError


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
