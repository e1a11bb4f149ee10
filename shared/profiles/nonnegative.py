"""Least squares with weights that are not negative, in numpy alone: services need no scipy for it."""

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.float64]
_MAX_ENTRIES = 3
"""How often a column may enter the solution, on average: as scipy has it."""


def nonnegative_least_squares(rows: Array, targets: Array) -> Array:
    """The `x >= 0` that minimises `|rows @ x - targets|`.

    The active-set method of Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23. Columns
    enter the solution one by one, the steepest first; those whose weights would turn negative leave it.

    Args:
        rows: (samples, columns).
        targets: (samples,).

    Returns:
        (columns,)
    """
    num_columns = rows.shape[1]
    tolerance = 10 * max(rows.shape) * numpy.finfo(float).eps * float(numpy.linalg.norm(rows, 1))
    weights = numpy.zeros(num_columns)
    inside = numpy.zeros(num_columns, dtype=bool)
    for _ in range(_MAX_ENTRIES * num_columns):
        gradient = numpy.where(inside, -numpy.inf, rows.T @ (targets - rows @ weights))
        steepest = int(gradient.argmax())
        if gradient[steepest] <= tolerance:
            break
        inside[steepest] = True
        weights = _settled(rows, targets, weights, inside)
    return weights


def _settled(rows: Array, targets: Array, weights: Array, inside: NDArray[numpy.bool_]) -> Array:
    """The best weights of the columns `inside`, from which those are taken that would be negative."""
    while True:
        best = numpy.zeros_like(weights)
        best[inside] = numpy.linalg.lstsq(rows[:, inside], targets)[0]
        negative = inside & (best < 0)
        if not negative.any():
            return best
        share = float((weights[negative] / (weights[negative] - best[negative])).min())
        weights = weights + share * (best - weights)
        first = numpy.where(negative, weights, numpy.inf).argmin()
        inside &= weights > 0
        inside[first] = False  # where rounding has left it a little above zero
