"""Where an op gives way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.slices import MAX_SLICES, next_cut_s, num_slices


def test_a_pass_has_a_slice_for_each_layer_up_to_a_limit() -> None:
    assert [num_slices(layers) for layers in (1, 3, MAX_SLICES, 80)] == [1, 3, MAX_SLICES, MAX_SLICES]


@pytest.mark.parametrize(
    ("from_s", "cut_s"), [(0.1, 1.0), (1.0, 1.0), (1.1, 2.0), (2.0, 2.0), (2.1, 4.0), (5.9, 6.0), (6.0, 6.0)]
)
def test_the_next_end_of_a_slice(from_s: float, cut_s: float) -> None:
    # A forward of 2 s and a backward of 4 s, two slices each.
    assert next_cut_s((2.0, 4.0), 2, from_s) == pytest.approx(cut_s)


@given(
    st.lists(st.floats(0.001, 10), min_size=1, max_size=3), st.integers(1, MAX_SLICES), st.floats(0.001, 1)
)
def test_it_is_a_slice_away_at_most_and_never_before(passes_s: list[float], count: int, share: float) -> None:
    from_s = share * sum(passes_s)
    cut_s = next_cut_s(passes_s, count, from_s)
    assert from_s - 1e-5 <= cut_s <= min(sum(passes_s), from_s + max(passes_s) / count) + 1e-9
