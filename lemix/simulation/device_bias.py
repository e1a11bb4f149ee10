"""Devices that are off their profile by a table of their own, so that no scheduler's formula is theirs."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import log2

from shared.messages.events import OpKind
from shared.profiles.times import NO_WORK, StageTimes, Work

Entry = tuple[OpKind, tuple[int, ...]]
"""A kind of op, and the logarithms to base 2 of its rows, sequences and read positions."""


@dataclass(frozen=True, slots=True)
class BiasedTimes:
    """Implements `StageTimes`: `times`, each multiplied by what a table says of an op of its size.

    The table has a number for each doubling of rows, sequences and read positions. Their logarithms are drawn
    from N(0, sigma); between the entries they are interpolated.
    """

    times: StageTimes
    sigma: float
    seed: str
    """The same seed gives the same table."""
    _table: dict[Entry, float] = field(default_factory=dict)
    """Logarithms, drawn when they are first asked for."""

    def iteration_s(self, work: Work) -> float:
        return self._factor("iteration", work) * self.times.iteration_s(work)

    def forward_s(self, work: Work) -> float:
        return self._factor("forward", work) * self.times.forward_s(work)

    def backward_s(self, work: Work) -> float:
        return self._factor("backward", work) * self.times.backward_s(work)

    def step_s(self) -> float:
        return self._factor("step", NO_WORK) * self.times.step_s()

    def _factor(self, kind: OpKind, work: Work) -> float:
        sizes = (work.num_tokens, work.num_sequences, work.num_context_tokens)
        return math.exp(sum(weight * self._entry((kind, at)) for at, weight in _corners(sizes)))

    def _entry(self, entry: Entry) -> float:
        if entry not in self._table:
            self._table[entry] = random.Random(f"{self.seed} {entry}").gauss(0.0, self.sigma)
        return self._table[entry]


def _corners(sizes: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], float]]:
    """The table's entries around an op of these sizes, with their weights, which sum to 1."""
    places = [log2(max(1, size)) for size in sizes]
    for offsets in product((0, 1), repeat=len(places)):
        at = tuple(int(place) + offset for place, offset in zip(places, offsets, strict=True))
        yield at, math.prod(1 - abs(place - each) for place, each in zip(places, at, strict=True))
