"""The order in which microbatches enter, against orders drawn by hand.

`F0 a1`: the forward of microbatch 1 of batch a is done on stage 0; `B0 a1`: its backward; `S1 a`: stage 1
has stepped for batch a. Beside each event stands what enters at once.
"""

import pytest

from shared.pipeline import (
    SCHEDULES,
    Pipeline,
    Schedule,
    Shape,
    asynchronous,
    double_buffered,
    gpipe,
)
from shared.schedule import ScheduleName

Order = list[tuple[str, str]]


def happen(pipeline: Pipeline, event: str) -> Pipeline:
    if event == "start":
        return pipeline
    kind, stage, batch_id = event[0], int(event[1]), event[3]
    match kind:
        case "F":
            return pipeline.forward_done(stage, batch_id, int(event[4]))
        case "B":
            return pipeline.backward_done(stage, batch_id, int(event[4]))
        case _:
            return pipeline.step_done(stage, batch_id)


def entered(schedule: Schedule, num_stages: int, counts: dict[str, int], events: list[str]) -> Order:
    pipeline = Pipeline(num_stages)
    for batch_id, count in counts.items():
        pipeline = pipeline.add(Shape(batch_id, count))
    order = []
    for event in events:
        pipeline = happen(pipeline, event)
        entering = []
        while (slot := pipeline.upcoming) and schedule(pipeline):
            pipeline = pipeline.feed()
            entering.append(f"{slot.batch_id}{slot.index}")
        order.append((event, " ".join(entering)))
    return order


ONE_STAGE: Order = [
    ("start", "a0"),
    ("F0 a0", ""),
    ("B0 a0", "a1"),
    ("F0 a1", ""),
    ("B0 a1", ""),
    ("S0 a", "b0"),
]
ASYNC_TWO_STAGES: Order = [
    ("start", "a0"),
    ("F0 a0", "a1"),
    ("F1 a0", ""),
    ("B1 a0", ""),
    ("F0 a1", ""),
    ("F1 a1", ""),
    ("B0 a0", "b0"),  # stage 1 steps for a while b is on its way: no flush
    ("B1 a1", ""),
    ("S1 a", ""),
    ("F0 b0", ""),
    ("B0 a1", "b1"),
    ("S0 a", ""),
]
SYNC_TWO_STAGES: Order = [
    ("start", "a0"),
    ("F0 a0", "a1"),
    ("F0 a1", ""),
    ("B0 a0", ""),
    ("S1 a", ""),
    ("B0 a1", ""),
    ("S0 a", "b0"),
    ("F0 b0", "b1"),
]
ASYNC_FOUR_STAGES: Order = [
    ("start", "a0"),
    ("F0 a0", "a1"),
    ("F0 a1", "b0"),
    ("F0 b0", "b1"),
    ("F0 b1", ""),  # four in flight
    ("B0 a0", "c0"),
    ("B0 a1", ""),  # c0 is still in stage 0
    ("F0 c0", "c1"),
    ("S3 a", ""),
]
SYNC_FOUR_STAGES: Order = [
    ("start", "a0"),
    ("F0 a0", "a1"),
    ("F0 a1", ""),
    ("B0 a0", ""),
    ("B0 a1", ""),
    ("S3 a", ""),
    ("S2 a", ""),
    ("S1 a", ""),
    ("S0 a", "b0"),
]


GPIPE_TWO_STAGES: Order = [
    ("start", "a0"),
    ("F0 a0", "a1"),
    ("F0 a1", "a2"),  # however many are in flight
    ("F0 a2", ""),
    ("B0 a0", ""),
    ("B0 a1", ""),
    ("B0 a2", ""),
    ("S1 a", ""),
    ("S0 a", "b0"),
]


@pytest.mark.parametrize(
    ("schedule", "num_stages", "order"),
    [
        ("async", 1, ONE_STAGE),
        ("1f1b", 1, ONE_STAGE),
        ("async", 2, ASYNC_TWO_STAGES),
        ("1f1b", 2, SYNC_TWO_STAGES),
        ("async", 4, ASYNC_FOUR_STAGES),
        ("1f1b", 4, SYNC_FOUR_STAGES),
    ],
)
def test_microbatches_enter_as_drawn(schedule: ScheduleName, num_stages: int, order: Order) -> None:
    counts = {"a": 2, "b": 2, "c": 2}

    assert entered(SCHEDULES[schedule], num_stages, counts, [event for event, _ in order]) == order


def test_with_more_microbatches_than_stages_the_first_backward_lets_the_next_enter() -> None:
    events = ["start", "F0 a0", "F0 a1", "B0 a0", "F0 a2", "B0 a1", "F0 a3", "B0 a2", "F0 b0"]

    order = entered(asynchronous, 2, {"a": 4, "b": 1}, events)

    assert [entering for _, entering in order] == ["a0", "a1", "", "a2", "", "a3", "", "b0", ""]


def test_all_microbatches_enter_before_any_comes_back_under_gpipe() -> None:
    order = GPIPE_TWO_STAGES

    assert entered(gpipe, 2, {"a": 3, "b": 3}, [event for event, _ in order]) == order


def test_double_buffering_lets_a_batch_enter_when_at_most_one_other_has_not_stepped() -> None:
    events = ["start", "F0 a0", "F0 b0", "F0 c0", "S3 a", "S2 a", "S1 a", "S0 a", "F0 c0"]
    counts = {"a": 1, "b": 1, "c": 1, "d": 1}

    full = [entering for _, entering in entered(asynchronous, 4, counts, events[:4])]
    double = [entering for _, entering in entered(double_buffered(asynchronous), 4, counts, events)]

    assert full == ["a0", "b0", "c0", "d0"]
    assert double == ["a0", "b0", "", "", "", "", "", "c0", ""]


def test_a_batch_is_complete_when_every_stage_has_its_gradients_and_all_before_it_are_ordered() -> None:
    pipeline = Pipeline(2).add(Shape("a", 1)).add(Shape("b", 1)).feed().forward_done(0, "a", 0).feed()
    for batch_id in ("b", "a"):
        pipeline = pipeline.gradients_ready(1, batch_id, 1.0)
    assert pipeline.complete is None
    pipeline = pipeline.gradients_ready(0, "b", 2.0)
    assert pipeline.complete is None, "a comes first"
    pipeline = pipeline.gradients_ready(0, "a", 4.0)
    assert pipeline.complete is not None
    assert (pipeline.complete.batch_id, pipeline.complete.squared_norm) == ("a", 5.0)

    pipeline = pipeline.order("a", 7)
    assert pipeline.complete is not None
    assert (pipeline.complete.batch_id, pipeline.complete.squared_norm) == ("b", 3.0)


def test_a_batch_leaves_when_all_stages_have_stepped() -> None:
    pipeline = Pipeline(2).add(Shape("a", 1)).add(Shape("b", 2)).feed()

    assert pipeline.step_done(1, "a").open_batch("a") is not None
    assert pipeline.step_done(1, "a").step_done(0, "a").open_batch("a") is None
