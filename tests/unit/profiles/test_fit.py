"""The fit finds again what it was given, and never goes down."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.profiles.fit import fitted_times
from shared.profiles.times import Work, work_of_rows


def slower_of_memory_and_compute(work: Work) -> float:
    return max(5e-3, 5e-5 * work.num_tokens) + 2e-9 * work.num_pairs + 1e-7 * work.num_context_tokens


WORKS = [work_of_rows(0, length) for length in (1, 10, 50, 90, 100, 110, 200, 400, 800)] + [
    work_of_rows(context - 1, 1) * batch for batch in (1, 10, 50, 100) for context in (1, 100, 1000)
]


def test_a_kink_that_was_sampled_is_found_exactly() -> None:
    fitted = fitted_times([(work, slower_of_memory_and_compute(work)) for work in WORKS])
    unseen = [work_of_rows(100, 150), work_of_rows(0, 1600), work_of_rows(499, 1) * 30, work_of_rows(0, 2)]
    for work in unseen:
        assert fitted.seconds(work) == pytest.approx(slower_of_memory_and_compute(work), rel=1e-6)


def test_small_and_large_seconds_count_alike() -> None:
    """The least relative errors of 1 ms and 3 ms for one work are at 1.2 ms, not at their mean."""
    work = work_of_rows(0, 8)
    fitted = fitted_times([(work, 1e-3), (work, 3e-3)])
    assert fitted.seconds(work) == pytest.approx(1.2e-3)


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(1e-5, 1.0)), min_size=1, max_size=20))
def test_more_tokens_never_take_less(measured: list[tuple[int, float]]) -> None:
    fitted = fitted_times([(work_of_rows(0, tokens), seconds) for tokens, seconds in measured])
    seconds = [fitted.seconds(work_of_rows(0, tokens)) for tokens in range(1, 1000, 7)]
    assert all(later >= earlier >= 0 for earlier, later in pairwise(seconds))


def test_a_fit_needs_samples_that_took_time() -> None:
    with pytest.raises(ValueError, match="samples"):
        fitted_times([])
    with pytest.raises(ValueError, match="samples"):
        fitted_times([(work_of_rows(0, 1), 0.0)])
