"""Whether a profile tells rows, pairs and read positions apart, of a noisy device that is known."""

import random
from typing import cast

import pytest

from lemix.profiling.command import measure, medians
from lemix.profiling.grid import IterationShape, grid_for, mixed
from lemix.profiling.pipeline import MeasuredOp, ProfiledPipeline
from shared.profiles.fit import FittedTimes, fitted_times
from shared.profiles.times import NO_WORK, Work, work_of_rows

PAIR_S, READ_S = 4e-10, 2e-7
NOISE = 0.02


def device_s(work: Work) -> float:
    """A stage of a few hundred million parameters: weights are read, or rows computed; then attention."""
    attention_s = PAIR_S * work.num_pairs + READ_S * work.num_context_tokens
    return max(4e-3, 3e-5 * work.num_tokens) + attention_s + 1e-5 * work.num_sequences


def work_of(shape: IterationShape) -> Work:
    return sum((work_of_rows(start, num_tokens) for start, num_tokens in shape.chunks), NO_WORK)


class NoisyPipeline:
    """Takes the device's seconds, and up to a few percent more or less."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    async def iteration(self, shape: IterationShape) -> list[MeasuredOp]:
        return [self._took(work_of(shape))]

    async def batch(self, lengths: tuple[int, ...]) -> list[MeasuredOp]:
        return []

    def _took(self, work: Work) -> MeasuredOp:
        elapsed_s = device_s(work) * self._rng.lognormvariate(0, NOISE)
        return MeasuredOp(0, "iteration", work, elapsed_s, None)


async def fitted(seed: int) -> FittedTimes:
    pipeline = cast("ProfiledPipeline", NoisyPipeline(seed))
    points = medians(await measure(pipeline, grid_for(8192, is_quick=False)))
    return fitted_times([(point.work, point.elapsed_s) for point in points])


@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_pairs_and_reads_have_their_own_seconds(seed: int) -> None:
    fit = await fitted(seed)
    assert fit.pair_s == pytest.approx(PAIR_S, rel=0.25)
    assert fit.context_token_s == pytest.approx(READ_S, rel=0.1)


@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_a_late_piece_beside_decoding_is_foreseen(seed: int) -> None:
    """Sizes that the grid does not have."""
    fit, rng = await fitted(seed), random.Random(seed)
    for _ in range(100):
        shape = mixed(rng.randint(1, 24), rng.randint(8, 600), rng.randint(512, 4000), rng.randint(200, 500))
        work = work_of(shape)
        assert fit.seconds(work) == pytest.approx(device_s(work), rel=0.03)


def test_late_pieces_that_do_not_fit_the_context_are_left_out() -> None:
    starts = {
        start
        for shape in grid_for(1024, is_quick=False).iterations
        for start, rows in shape.chunks
        if rows > 1
    }
    assert max(starts) == 512
