"""The share of expected requests that a batch would make late, worked out by hand."""

from collections.abc import Callable, Sequence

import pytest

from services.scheduler.forecast import Forecast, Interval
from services.scheduler.policies.deferral import (
    BatchOps,
    Expected,
    OpTimes,
    late_share,
    safe_again_s,
)
from shared.slices import NumSlices

AT_ONCE = Forecast((Interval(0.0, 0.7),), (Interval(0.7, 1.6),))
"""One stage: forward until 0.7, backward until 1.6, then the step."""


def expected(
    response: Callable[[int, float], float], *, nodes: Sequence[int] = (0,), batches_per_s: float = 1.0
) -> Expected:
    return Expected(response=response, nodes=nodes, slo_s=1.0, batches_per_s=batches_per_s)


def share(
    *stages: OpTimes,
    response_s: float = 0.4,
    num_microbatches: int = 1,
    batches_per_s: float = 1.0,
    forecast: Forecast = AT_ONCE,
) -> float:
    ops = BatchOps(stages, num_microbatches)
    return late_share(0, forecast, ops, expected(lambda node, at_s: response_s, batches_per_s=batches_per_s))


def test_the_beginning_of_each_op_is_unsafe_by_what_it_is_longer_than_the_spare_time() -> None:
    # 0.6 s to spare: 0.1 s of the forward, 0.3 of the backward, 0.05 of the step.
    assert share(OpTimes(0.7, 0.9, 0.65)) == pytest.approx(0.1 + 0.3 + 0.05)
    assert share(OpTimes(0.7, 0.5, 0.6)) == pytest.approx(0.1)
    assert share(OpTimes(0.6, 0.6, 0.6)) == 0


def test_each_microbatch_counts_and_the_step_once() -> None:
    assert share(OpTimes(0.7, 0.75, 0.65), num_microbatches=3) == pytest.approx(3 * (0.1 + 0.15) + 0.05)


def test_the_unsafe_time_counts_as_often_as_batches_come_and_is_a_share() -> None:
    assert share(OpTimes(0.7, 0.9, 0.6), batches_per_s=0.5) == pytest.approx(0.5 * 0.4)
    assert share(OpTimes(0.7, 0.9, 0.6), batches_per_s=9.0) == 1.0


def test_each_stage_counts() -> None:
    two = Forecast(AT_ONCE.forward * 2, AT_ONCE.backward * 2)
    assert share(OpTimes(0.7, 0, 0), OpTimes(0.8, 0, 0), forecast=two) == pytest.approx(0.1 + 0.2)


def test_no_more_of_an_op_is_unsafe_than_it_lasts() -> None:
    assert share(OpTimes(0.1, 0.2, 0.3), response_s=5.0) == pytest.approx(0.1 + 0.2 + 0.3)


def test_nobody_is_late_where_another_node_answers_in_time() -> None:
    ops = BatchOps((OpTimes(0.7, 0.9, 0.65),), 1)

    def at(other_s: float) -> float:
        return late_share(0, AT_ONCE, ops, expected(lambda node, at_s: (0.4, other_s)[node], nodes=(0, 1)))

    assert at(1.0) == 0
    assert at(1.01) == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("durations_s", "begins_s"),
    [(OpTimes(0.9, 0.1, 0.1), 0.0), (OpTimes(0.1, 0.9, 0.1), 0.7), (OpTimes(0.1, 0.1, 0.9), 1.6)],
)
def test_requests_are_expected_when_the_longest_op_begins(durations_s: OpTimes, begins_s: float) -> None:
    def response(node: int, at_s: float) -> float:
        return 0.4 if at_s == begins_s else 0.0

    share = late_share(0, AT_ONCE, BatchOps((durations_s,), 1), expected(response))
    assert share == pytest.approx(0.3)


def test_it_is_safe_again_when_the_first_node_answers_in_time() -> None:
    assert safe_again_s(5.0, expected(lambda node, at_s: (1.7, 1.2)[node], nodes=(0, 1))) == pytest.approx(
        5.2
    )


def test_of_an_op_in_slices_the_beginning_of_each_slice_is_unsafe() -> None:
    # 0.6 s to spare: 0.1 s of each of the two slices of the forward, 0.15 of those of the backward.
    assert share(OpTimes(1.4, 1.5, 1.2, NumSlices(2, 2))) == pytest.approx(2 * 0.1 + 2 * 0.15)
    assert share(OpTimes(1.4, 1.5, 1.2, NumSlices(3, 3))) == 0
    assert share(OpTimes(1.4, 1.5, 1.2, NumSlices(3, 1))) == pytest.approx(1.2 - 0.6)
