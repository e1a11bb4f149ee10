"""Searches for the fewest nodes, or the highest rate, that do what is asked: which run to make next. Pure.

A search yields the runs that it wants next, and is sent the metrics of each.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lemix.studies.grid import Cell
from lemix.studies.rows import Metrics
from lemix.studies.verdicts import SLO
from lemix.studies.while_serving import KEPT

KEPT_ENOUGH = 0.95
"""Share of the training that was applied while requests arrived, of what came early enough (see
`while_serving`).
"""
TBT_P99 = "tbt_p99_s"

T = TypeVar("T")
Steps = Generator[Sequence[Cell], Sequence[Metrics], T]
"""A part of a search, with its result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The demand on answers; the demand on training is always to keep up with it."""

    in_time: float
    """Share of the requests."""
    tbt_p99_s: float | None = None
    """Time between tokens at most, of 99 % of them. None: it does not matter."""

    def is_served(self, metrics: Metrics) -> bool:
        share, tbt_s = metrics.get(SLO) or 0.0, metrics.get(TBT_P99)
        return share >= self.in_time and (self.tbt_p99_s is None or (tbt_s or 0.0) <= self.tbt_p99_s)


def is_trained(metrics: Metrics) -> bool:
    kept = metrics.get(KEPT)
    return kept is None or kept >= KEPT_ENOUGH


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether most of the seeds say yes."""

    serves: bool
    trains: bool

    @property
    def is_enough(self) -> bool:
        return self.serves and self.trains


def judged(objective: Objective, runs: Sequence[Cell]) -> Steps[Outcome]:
    """Make the runs of one setting, a seed each: no more than a majority where that agrees on both
    questions.
    """
    majority = len(runs) // 2 + 1
    metrics = list((yield runs[:majority]))
    if not (_agree(map(objective.is_served, metrics)) and _agree(map(is_trained, metrics))):
        metrics += yield runs[majority:]
    return Outcome(
        sum(map(objective.is_served, metrics)) >= majority, sum(map(is_trained, metrics)) >= majority
    )


def _agree(answers: Iterable[bool]) -> bool:
    return len(set(answers)) <= 1


def least(meets: Callable[[int], Steps[bool]], low: int, high: int) -> Steps[int | None]:
    """The least number of low..high that meets, as if every greater one did too; None: not even the
    greatest.
    """
    below, at, step = low - 1, low, 1
    while not (yield from meets(at)):
        if at == high:
            return None
        below, at, step = at, min(at + step, high), 2 * step
    while at - below > 1:
        middle = (below + at) // 2
        if (yield from meets(middle)):
            at = middle
        else:
            below = middle
    return at


def greatest(meets: Callable[[int], Steps[bool]], low: int, high: int) -> Steps[int | None]:
    """The greatest number of low..high that meets, as if every smaller one did too; None: not even the
    smallest.
    """
    at, above = low - 1, high + 1
    while above - at > 1:
        middle = (at + above) // 2
        if (yield from meets(middle)):
            at = middle
        else:
            above = middle
    return at if at >= low else None


def fewest_nodes(
    objectives: Sequence[Objective], runs: Callable[[int], Sequence[Cell]], low: int, high: int
) -> Steps[int | None]:
    """The fewest nodes for each objective, the easiest first; returns the last. All seeds are run there."""
    found = None
    for objective in objectives:

        def meets(nodes: int, objective: Objective = objective) -> Steps[bool]:
            return (yield from judged(objective, runs(nodes))).is_enough

        found = yield from least(meets, found or low, high)
        if found is None:
            return None
        yield runs(found)
    return found


def fewest_of_both(
    objectives: Sequence[Objective], runs: Callable[[int, int], Sequence[Cell]], low: int, high: int
) -> Steps[None]:
    """The same where (nodes that serve, nodes that train) never share work: the fewest of each kind."""

    def trains(training: int) -> Steps[bool]:
        return (yield from judged(objectives[0], runs(low, training))).trains

    training = yield from least(trains, 1, high - low)
    if training is None:
        return
    for objective in objectives:

        def serves(serving: int, objective: Objective = objective) -> Steps[bool]:
            return (yield from judged(objective, runs(serving, training))).serves

        serving = yield from least(serves, low, high - training)
        if serving is None:
            return
        yield runs(serving, training)
        low = serving


def highest_rate(
    objective: Objective, runs: Callable[[int], Sequence[Cell]], num_rates: int
) -> Steps[int | None]:
    """The greatest of so many rates, in ascending order, that is still enough."""

    def meets(rate: int) -> Steps[bool]:
        return (yield from judged(objective, runs(rate))).is_enough

    found = yield from greatest(meets, 0, num_rates - 1)
    if found is not None:
        yield runs(found)
    return found


def highest_of_split(
    objective: Objective, runs: Callable[[int, int], Sequence[Cell]], num_rates: int, num_nodes: int
) -> Steps[None]:
    """The same where nodes never share work, with as few nodes for the training as it needs. `runs`: by rate
    and nodes that train.
    """

    def trains(training: int) -> Steps[bool]:
        return (yield from judged(objective, runs(0, training))).trains

    training = yield from least(trains, 1, num_nodes - 1)
    if training is not None:
        yield from highest_rate(objective, lambda rate: runs(rate, training), num_rates)


def all_of(runs: Sequence[Cell]) -> Steps[None]:
    """Every one of them."""
    yield runs
