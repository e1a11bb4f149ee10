"""The least squares of fits: scipy's own solution, on problems made as fits make them."""

import numpy
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from shared.profiles.nonnegative import Array, nonnegative_least_squares


def ramps(places: Array) -> Array:
    """A column of ones, and one for each place that rises from there on: (places, places + 1)."""
    return numpy.column_stack([numpy.ones(len(places)), numpy.maximum(0, places[:, None] - places[None, :])])


@given(st.lists(st.tuples(st.integers(1, 2000), st.floats(0.01, 10)), min_size=1, max_size=30))
def test_it_is_as_good_as_scipy_s(measured: list[tuple[int, float]]) -> None:
    rows = ramps(numpy.array([float(place) for place, _ in measured]))
    rows /= numpy.abs(rows).max(axis=0, initial=1.0)
    targets = numpy.array([seconds for _, seconds in measured])
    weights = nonnegative_least_squares(rows, targets)
    assert (weights >= 0).all()
    _, least = nnls(rows, targets)
    assert numpy.linalg.norm(rows @ weights - targets) <= least * (1 + 1e-9) + 1e-9


def test_a_weight_that_would_be_negative_is_zero() -> None:
    rows = numpy.array([[1.0, 0.0], [1.0, 1.0]])
    numpy.testing.assert_allclose(nonnegative_least_squares(rows, numpy.array([2.0, 1.0])), [1.5, 0.0])
