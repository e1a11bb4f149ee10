"""Seconds of an op from its size, learned from measurements. Evaluated in pure Python, some 100 ns a time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.profiles.times import Work

if TYPE_CHECKING:
    import numpy

MAX_TABLE = 8192
"""Beyond so many tokens or sequences a curve goes on straight."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A piecewise linear function of whole numbers, as a table that goes on straight after its end."""

    values: tuple[float, ...]
    """Values at 0, 1, 2, ..."""
    slope: float
    """After the last one."""

    def at(self, number: int) -> float:
        last = len(self.values) - 1
        return self.values[number] if number <= last else self.values[last] + self.slope * (number - last)


@dataclass(frozen=True, slots=True)
class FittedTimes:
    """The seconds of one kind of op on one stage."""

    by_tokens: Curve
    """The op's constant is in it."""
    by_sequences: Curve
    pair_s: float
    context_token_s: float

    def seconds(self, work: Work) -> float:
        return (
            self.by_tokens.at(work.num_tokens)
            + self.by_sequences.at(work.num_sequences)
            + self.pair_s * work.num_pairs
            + self.context_token_s * work.num_context_tokens
        )


def fitted_times(samples: Sequence[tuple[Work, float]]) -> FittedTimes:
    """The non-negative least squares fit of (work, seconds), each error relative to its own seconds.

    Features: 1, tokens, sequences, pairs, context tokens, and for each number of tokens and of sequences that
    occurs max(0, number - it). Non-negative weights make it convex in both, as max(memory, compute) is.

    Raises:
        ValueError: there is no sample, or one took no time.
    """
    if not samples or min(seconds for _, seconds in samples) <= 0:
        raise ValueError("a fit needs samples, each of which took time")
    token_knots = _knots(work.num_tokens for work, _ in samples)
    sequence_knots = _knots(work.num_sequences for work, _ in samples)
    weights = _relative_nnls([_features(work, token_knots, sequence_knots) for work, _ in samples], samples)
    constant, pair_s, context_token_s = weights[:3]
    slopes = weights[3 : 3 + len(token_knots)]
    return FittedTimes(
        by_tokens=_curve(constant, token_knots, slopes),
        by_sequences=_curve(0.0, sequence_knots, weights[3 + len(token_knots) :]),
        pair_s=pair_s,
        context_token_s=context_token_s,
    )


def _knots(numbers: Iterable[int]) -> list[int]:
    """0, and each number but the largest: nothing is known of what comes after it."""
    return [0, *sorted({min(number, MAX_TABLE) for number in numbers} - {0})[:-1]]


def _features(work: Work, token_knots: Sequence[int], sequence_knots: Sequence[int]) -> list[float]:
    return [
        1.0,
        work.num_pairs,
        work.num_context_tokens,
        *(max(0, work.num_tokens - knot) for knot in token_knots),
        *(max(0, work.num_sequences - knot) for knot in sequence_knots),
    ]


def load_solver() -> None:
    """Import what a fit needs, which takes a tenth of a second, before the first one does."""
    import shared.profiles.nonnegative  # noqa: F401


def _relative_nnls(rows: Sequence[Sequence[float]], samples: Sequence[tuple[Work, float]]) -> list[float]:
    import numpy  # here: whoever only evaluates a fit need not wait for it

    from shared.profiles.nonnegative import nonnegative_least_squares

    seconds = numpy.array([seconds for _, seconds in samples])
    relative = numpy.array(rows, dtype=float) / seconds[:, None]
    scales = _nonzero(numpy.abs(relative).max(axis=0))
    weights = nonnegative_least_squares(relative / scales, numpy.ones(len(samples)))
    return [float(weight) for weight in weights / scales]


def _nonzero(
    scales: "numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]",
) -> "numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]":
    scales[scales == 0] = 1.0
    return scales


def _curve(constant: float, knots: Sequence[int], slopes: Sequence[float]) -> Curve:
    slope_from = dict(zip(knots, slopes, strict=True))
    values, slope = [constant], 0.0
    for number in range(knots[-1] + 1):
        slope += slope_from.get(number, 0.0)
        values.append(values[-1] + slope)
    return Curve(tuple(values), slope)
