"""Devices with a table of their own."""

import math
from statistics import fmean, stdev

import pytest

from lemix.simulation.device_bias import BiasedTimes
from lemix.simulation.device_noise import DeviceNoise
from shared.profiles.profile import stage_times
from shared.profiles.times import Work, work_of_rows

TIMES, SIGMA = stage_times("llama2-7b@a100", 0, 2), 0.05


def factor(biased: BiasedTimes, work: Work) -> float:
    return biased.iteration_s(work) / TIMES.iteration_s(work)


def test_entries_spread_by_sigma() -> None:
    """Powers of two are entries themselves."""
    biased = BiasedTimes(TIMES, SIGMA, "a")
    decoding = [
        work_of_rows(2**context - 1, 1) * 2**count for context in range(4, 12) for count in range(1, 9)
    ]
    logarithms = [math.log(factor(biased, work)) for work in decoding]
    assert len(set(logarithms)) == len(decoding)
    assert fmean(logarithms) == pytest.approx(0, abs=0.02)
    assert stdev(logarithms) == pytest.approx(SIGMA, rel=0.3)


def test_between_entries_the_logarithm_is_between_theirs() -> None:
    biased = BiasedTimes(TIMES, SIGMA, "a")
    around = [Work(rows, 1, 1, context) for rows in (128, 256) for context in (128, 256)]
    logarithms = [math.log(factor(biased, work)) for work in around]
    assert min(logarithms) < math.log(factor(biased, work_of_rows(0, 181))) < max(logarithms)


def test_the_same_seed_is_the_same_table_whoever_asks_first() -> None:
    first, again, other = (BiasedTimes(TIMES, SIGMA, seed) for seed in ("a", "a", "b"))
    works = [work_of_rows(0, rows) for rows in (10, 100, 1000)]
    factors = [factor(first, work) for work in works]
    assert [factor(again, work) for work in reversed(works)] == factors[::-1]
    assert [factor(other, work) for work in works] != factors


def test_kinds_of_ops_have_tables_of_their_own() -> None:
    biased, work = BiasedTimes(TIMES, SIGMA, "a"), work_of_rows(0, 128)
    factors = {
        biased.iteration_s(work) / TIMES.iteration_s(work),
        biased.forward_s(work) / TIMES.forward_s(work),
        biased.backward_s(work) / TIMES.backward_s(work),
        biased.step_s() / TIMES.step_s(),
    }
    assert len(factors) == 4


def test_nodes_are_biased_alike_and_stages_are_not() -> None:
    noise, work = DeviceNoise(noise=0.0, bias=SIGMA, seed=3), work_of_rows(0, 100)
    seconds = [noise.on(TIMES, node, stage).iteration_s(work) for node in range(2) for stage in range(2)]
    assert seconds[:2] == seconds[2:] and seconds[0] != seconds[1]
