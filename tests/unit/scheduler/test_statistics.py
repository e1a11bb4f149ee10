"""Running statistics against the plain ones."""

import random
import statistics

import pytest

from services.scheduler.statistics import (
    LATE_SHARE,
    MAX_MARGIN,
    RATE_WINDOW_S,
    ArrivalRate,
    LateMargin,
    MeanError,
    RunningMoments,
)


def test_moments_are_those_of_the_population() -> None:
    rng, moments = random.Random(1), RunningMoments()
    assert (moments.mean, moments.std) == (0.0, 0.0)
    values = [rng.uniform(10, 1000) for _ in range(100)]
    for value in values:
        moments.add(value)
    assert moments.count == 100
    assert moments.mean == pytest.approx(statistics.fmean(values))
    assert moments.std == pytest.approx(statistics.pstdev(values))


def test_a_steady_rate_is_found() -> None:
    rate = ArrivalRate()
    assert rate.per_s(5.0) == 0.0
    for index in range(1000):
        rate.add(100.0 + index / 20)
    assert rate.per_s(150.0) == pytest.approx(20.0, rel=0.01)


def test_the_rate_of_a_new_cluster_is_not_too_low() -> None:
    rate = ArrivalRate()
    for index in range(40):
        rate.add(index / 20)
    assert rate.per_s(2.0) == pytest.approx(20.0, rel=0.1)


def test_a_rate_fades_when_nothing_comes() -> None:
    rate = ArrivalRate()
    for index in range(1000):
        rate.add(index / 10)
    before = rate.per_s(100.0)
    assert rate.per_s(100.0 + RATE_WINDOW_S) == pytest.approx(before / 2.718281828, rel=0.001)


def test_errors_are_relative_to_what_happened() -> None:
    error = MeanError()
    assert error.mean == 0.0
    error.add(1.1, 1.0)
    error.add(1.0, 2.0)
    error.add(1.0, 0.0)
    assert error.count == 2
    assert error.mean == pytest.approx((0.1 + 0.5) / 2)


@pytest.mark.parametrize("late_share", [0.0, 0.04, 0.2])
def test_the_margin_grows_only_while_more_are_late_than_may_be(late_share: float) -> None:
    rng, margin = random.Random(0), LateMargin()
    for _ in range(2000):
        margin.add(is_late=rng.random() < late_share)
    assert (margin.share > 0.8 * MAX_MARGIN) == (late_share > LATE_SHARE)
    assert 0.0 <= margin.share <= MAX_MARGIN
    for _ in range(500):
        margin.add(is_late=False)
    assert margin.share < 0.01
