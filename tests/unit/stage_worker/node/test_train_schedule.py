"""What stage 0 lets enter, orders and tells, against what happens on the stages."""

from math import inf, nan

import pytest

from services.stage_worker.node.train_schedule import MAX_HELD_TOKENS, Enter, Lead, TrainSchedule
from shared.errors import LemixError
from shared.messages.training import (
    BatchReady,
    BatchStepped,
    GradientsReady,
    Microbatch,
    MicrobatchEntered,
    MicrobatchForward,
    StepAhead,
    StepDone,
    StepOrder,
    TrainingFailed,
)
from shared.schedule import Feeding, ScheduleName, StashingName


def forward(batch_id: str, index: int = 0, count: int = 1, *, tokens: int = 1) -> MicrobatchForward:
    microbatch = Microbatch(
        fence=1,
        batch_id=batch_id,
        index=index,
        count=count,
        lengths=(tokens,),
        label_rows=(),
        labels=(),
        loss_weight=1.0,
    )
    return MicrobatchForward(microbatch=microbatch, tokens=(0,) * tokens)


def ahead(
    batch_id: str, version: int, *, max_gradient_norm: float | None = None, keep: bool = False
) -> StepAhead:
    return StepAhead(
        fence=1,
        batch_id=batch_id,
        version=version,
        learning_rate=0.5,
        max_gradient_norm=max_gradient_norm,
        keep=keep,
    )


def order(batch_id: str, version: int, **changes: float | bool) -> StepOrder:
    return StepOrder(fence=1, batch_id=batch_id, version=version, learning_rate=0.5, **changes)  # type: ignore[arg-type]


def schedule(
    num_stages: int = 2, name: ScheduleName = "async", *, stashing: StashingName = "full", version: int = 0
) -> TrainSchedule:
    feeding = Feeding(schedule=name)
    return TrainSchedule(num_stages, feeding=feeding, stashing=stashing, version=version)


def entered(leads: list[Lead]) -> list[tuple[str, int]]:
    """What enters."""
    microbatches = [lead.forward.microbatch for lead in leads if isinstance(lead, Enter)]
    return [(microbatch.batch_id, microbatch.index) for microbatch in microbatches]


def gather(it: TrainSchedule, batch_id: str, *squared_norms: float) -> list[Lead]:
    """All stages have the batch's gradients, the last one first."""
    told: list[Lead] = []
    for stage, squared_norm in reversed(list(enumerate(squared_norms))):
        ready = GradientsReady(batch_id=batch_id, squared_norm=squared_norm, loss=2.0 * stage)
        told += it.gradients_ready(stage, ready)
    return told


def step(it: TrainSchedule, batch_id: str, version: int, num_stages: int = 2) -> list[Lead]:
    """All stages have stepped."""
    done = StepDone(batch_id=batch_id, version=version)
    return [lead for stage in range(num_stages) for lead in it.step_done(stage, done)]


def test_on_one_stage_a_whole_batch_goes_through_without_a_word_in_between() -> None:
    it = schedule(1)
    assert entered(it.feed(forward("a", 0, 2))) == [("a", 0)]
    assert it.feed(forward("a", 1, 2)) == []
    assert it.step_ahead(ahead("a", 1)) == []
    assert it.feed(forward("b")) == []
    assert it.left("a", 0, 0.0) == []
    assert entered(it.came_back("a", 0)) == [("a", 1)]
    assert it.left("a", 1, 0.0) == [MicrobatchEntered(batch_id="a", index=1)]
    assert it.came_back("a", 1) == []
    assert gather(it, "a", 1.0) == [order("a", 1)]
    assert step(it, "a", 1, 1) == [Enter(forward("b")), BatchStepped(batch_id="a", version=1, loss=0.0)]


@pytest.mark.parametrize(("name", "second"), [("async", [("b", 0)]), ("1f1b", []), ("gpipe", [])])
def test_the_next_batch_enters_as_its_schedule_says(
    name: ScheduleName, second: list[tuple[str, int]]
) -> None:
    it = schedule(2, name)
    it.feed(forward("a"))
    it.feed(forward("b"))
    it.step_ahead(ahead("a", 1))
    assert entered(it.left("a", 0, 0.0)) == second
    it.came_back("a", 0)
    assert gather(it, "a", 1.0, 3.0) == [order("a", 1)]
    *entering, told = step(it, "a", 1)
    assert entered(entering) == ([] if second else [("b", 0)])
    assert told == BatchStepped(batch_id="a", version=1, loss=2.0)


def test_a_microbatch_that_is_still_on_its_way_is_waited_for() -> None:
    it = schedule()
    it.feed(forward("a", 0, 2))
    assert it.left("a", 0, 0.0) == []
    assert entered(it.feed(forward("a", 1, 2))) == [("a", 1)]


def test_gradients_are_scaled_down_to_the_largest_norm_over_all_stages() -> None:
    it = schedule()
    it.feed(forward("a"))
    it.step_ahead(ahead("a", 1, max_gradient_norm=1.0))
    assert gather(it, "a", 9.0, 16.0) == [order("a", 1, gradient_scale=1 / 5)]


def test_a_version_that_is_to_serve_is_kept_by_all_stages() -> None:
    it = schedule()
    it.feed(forward("a"))
    it.step_ahead(ahead("a", 1, keep=True))
    assert gather(it, "a", 1.0, 1.0) == [order("a", 1, keep=True)]


def test_without_an_order_given_ahead_the_trainer_is_asked_once_and_its_order_goes_to_all() -> None:
    it = schedule()
    it.feed(forward("a"))
    assert gather(it, "a", 1.0, 2.0) == [BatchReady(batch_id="a", squared_norm=3.0)]
    assert it.order(order("a", 1)) == [order("a", 1)]
    assert step(it, "a", 1)[-1] == BatchStepped(batch_id="a", version=1, loss=2.0)


def test_an_order_given_ahead_that_comes_late_holds() -> None:
    it = schedule()
    it.feed(forward("a"))
    gather(it, "a", 1.0, 2.0)
    assert it.step_ahead(ahead("a", 1)) == [order("a", 1)]


@pytest.mark.parametrize("squared_norm", [nan, inf])
def test_gradients_that_are_not_finite_are_the_trainers_to_decide_and_later_orders_fall(
    squared_norm: float,
) -> None:
    it = schedule(version=4)
    for batch_id, version in (("a", 5), ("b", 6)):
        it.feed(forward(batch_id))
        it.step_ahead(ahead(batch_id, version))
        it.left(batch_id, 0, 0.0)
    (asked,) = gather(it, "a", 1.0, squared_norm)
    assert isinstance(asked, BatchReady)
    assert gather(it, "b", 1.0, 1.0) == [], "a comes first"
    skip = order("a", 4, skip=True)
    assert it.order(skip) == [skip, BatchReady(batch_id="b", squared_norm=2.0)]
    assert it.step_ahead(ahead("b", 5)) == [order("b", 5)]


def test_the_mean_over_nodes_takes_the_place_of_a_batchs_gradients_or_stands_alone() -> None:
    it = schedule()
    it.feed(forward("a"))
    for squared_norm in (1.0, 5.0):
        asked = BatchReady(batch_id="a", squared_norm=2 * squared_norm)
        assert gather(it, "a", squared_norm, squared_norm) == [asked]
    it.order(order("a", 2))
    step(it, "a", 2)
    assert gather(it, "round-1", 1.0, 1.0) == [BatchReady(batch_id="round-1", squared_norm=2.0)]
    assert it.order(order("round-1", 3)) == [order("round-1", 3)]
    assert step(it, "round-1", 3) == [BatchStepped(batch_id="round-1", version=3, loss=0.0)]


def test_a_stage_at_another_version_than_it_should_be_is_a_failure() -> None:
    it = schedule()
    it.feed(forward("a"))
    it.step_ahead(ahead("a", 1))
    gather(it, "a", 1.0, 1.0)
    (failed,) = it.step_done(1, StepDone(batch_id="a", version=3))
    assert isinstance(failed, TrainingFailed) and not failed.is_batch_at_fault


def test_after_a_merge_steps_go_on_from_its_version() -> None:
    it = schedule()
    it.merged(7)
    it.feed(forward("a"))
    it.step_ahead(ahead("a", 8))
    assert gather(it, "a", 1.0, 1.0) == [order("a", 8)]


def test_no_more_is_held_than_a_trainer_that_keeps_to_its_credits_feeds() -> None:
    it = schedule()
    it.feed(forward("a"))
    it.feed(forward("b", tokens=MAX_HELD_TOKENS))
    with pytest.raises(LemixError, match="waiting on this node already"):
        it.feed(forward("c"))
