"""The released score against values worked out by hand from its formula (see each test's comments)."""

import math

import pytest

from services.scheduler.forecast import Interval
from services.scheduler.policies.released_score import (
    NodeTrace,
    Scored,
    Trained,
    Weights,
    gaussian_density,
    released_forecast,
    score,
)

FORWARD_ETA, BACKWARD_ETA = 2e-6, 1e-6


def scored(
    trace: NodeTrace, weights: Weights, *, release_s: float, length: int, trains: bool = False
) -> Scored:
    return score(
        trace,
        weights,
        release_s=release_s,
        length=length,
        forward_s=FORWARD_ETA * length**2,
        backward_s=BACKWARD_ETA * length**2 if trains else 0.0,
    )


def after_training() -> NodeTrace:
    """Two stages; a training task of 200 tokens was released at 0 on the idle node: F = 0.08, B = 0.04.

    Forwards: 0 to 0.08 on both stages, for a stage does not wait for the one ahead to end.
    Backwards: stage 1 from 0.08 to 0.12, stage 0 from 0.12 to 0.16.
    """
    forecast = released_forecast(NodeTrace(num_stages=2), release_s=0.0, forward_s=0.08, backward_s=0.04)
    return NodeTrace(
        num_stages=2,
        last_release_s=0.0,
        last_forward_end_s=[interval.end_s for interval in forecast.forward],
        training=[Trained(forecast.backward, 0.04)],
        length_mean=200,
    )


def test_an_idle_node_answers_within_one_stage() -> None:
    # F = 2e-6 * 100^2 = 0.02; both stages from 10 to 10.02. II = 0, no gap, no lengths:
    # IP = -max(0 - 0, 0.2) = -0.2; score = -0.2 / (0.15 * 0.02)
    found = scored(NodeTrace(num_stages=2), Weights(), release_s=10.0, length=100)
    assert found.response_s == pytest.approx(0.02)
    assert found.score == pytest.approx(-0.2 / 0.003)


def test_a_training_task_goes_backward_from_the_last_stage() -> None:
    forecast = released_forecast(NodeTrace(num_stages=3), release_s=1.0, forward_s=0.2, backward_s=0.1)
    assert list(forecast.backward) == [
        pytest.approx((1.4, 1.5)),
        pytest.approx((1.3, 1.4)),
        pytest.approx((1.2, 1.3)),
    ]


def test_a_far_dependency_delays_the_stage_whose_backward_is_in_the_way() -> None:
    # Request of 100 tokens at 0.05, F = 0.02.
    # Stage 0: from max(0.08, 0.05) to 0.10, before the backward at 0.12.
    # Stage 1: 0.08 to 0.10 would overlap the backward at 0.08: from 0.12 to 0.14. The backward lies between
    # the forward before (end 0.08) and this one: II = max(0, 0.12 - 0.08 - 0.04) = 0.
    # RT = 0.14 - 0.05 = 0.09, gap = 0.05, IP = -max(0 - 0.05, 0.2) = -0.2, one length: LC = 0.
    found = scored(after_training(), Weights(), release_s=0.05, length=100)
    assert list(found.forecast.forward) == [pytest.approx((0.08, 0.10)), pytest.approx((0.12, 0.14))]
    assert found.forecast.idle_s == pytest.approx(0.0)
    assert found.score == pytest.approx(-0.2 / (0.15 * 0.09))


def test_what_the_backwards_do_not_fill_is_idle_time() -> None:
    # Request of 200 tokens at 0.02, F = 0.08.
    # Stage 0: 0.08 to 0.16 would overlap the backward at 0.12: from 0.16 to 0.24; II += 0.16 - 0.08 - 0.04.
    # Stage 1: starts when stage 0 starts, 0.16 to 0.24; the backward 0.08 to 0.12 lies before it, and after
    # the forward before: II += 0.16 - 0.08 - 0.04. II = 0.08 in all.
    # RT = 0.22, gap = 0.02, IP = -max(0.08 / 2 - 0.02, 0.01) = -0.02.
    # Lengths 100 and 200: mean 150, std 50; LC = exp(-1/2) / (50 sqrt(2 pi)) = 0.00483941.
    # score = (-0.02 + 2 * 0.00483941) / (0.5 * 0.22) = -0.0938289
    trace = after_training()
    trace = NodeTrace(
        num_stages=2,
        last_release_s=0.0,
        last_forward_end_s=trace.last_forward_end_s,
        training=trace.training,
        length_mean=150,
        length_std=50,
    )
    found = scored(trace, Weights(alpha=0.5, beta=2.0, epsilon=0.01), release_s=0.02, length=200)
    assert list(found.forecast.forward) == [pytest.approx((0.16, 0.24)), pytest.approx((0.16, 0.24))]
    assert found.forecast.idle_s == pytest.approx(0.08)
    assert found.score == pytest.approx(-0.0938289, rel=1e-5)


def test_a_stage_scans_training_from_where_the_stage_before_stopped() -> None:
    # F = 2. Stage 0: 1 to 3 overlaps the first backward (2 to 3): from 3 to 5, before the second (10);
    # II += 3 - 1 - 1. Stage 1 looks at the second task alone: from 3 to 5, and the first one's backward
    # (1 to 2), though it lies between, is not taken off: II += 3 - 1.
    first = Trained((Interval(2, 3), Interval(1, 2)), 1.0)
    second = Trained((Interval(10, 11), Interval(9, 10)), 1.0)
    trace = NodeTrace(
        num_stages=2, last_release_s=0.0, last_forward_end_s=[1.0, 1.0], training=[first, second]
    )
    forecast = released_forecast(trace, release_s=1.0, forward_s=2.0, backward_s=0.0)
    assert forecast.forward == ((3, 5), (3, 5))
    assert forecast.idle_s == 3.0


def test_the_score_is_inverted_the_slower_node_wins() -> None:
    idle = scored(NodeTrace(num_stages=2), Weights(), release_s=0.05, length=100)
    busy = scored(after_training(), Weights(), release_s=0.05, length=100)
    assert busy.response_s > idle.response_s
    assert busy.score > idle.score


def test_density_is_the_gaussian_one() -> None:
    assert gaussian_density(3.0, 3.0, 2.0) == pytest.approx(1 / (2 * math.sqrt(2 * math.pi)))
    assert gaussian_density(3.0, 3.0, 0.0) == 0.0
