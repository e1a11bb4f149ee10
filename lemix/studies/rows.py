"""Finished runs brought together: one row a setting, medians with ranges over its seeds. Pure."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Label = str | int | float
Labels = Mapping[str, Label]
"""A setting as tables name it: class, rate, training_rate, policy, ..."""
Metrics = Mapping[str, float | None]
"""None: there was nothing to measure."""

POLICY = "policy"
BOUND = "bound"
"""The policy of rows that say what no policy can exceed."""


class Spread(NamedTuple):
    """Over the seeds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """All runs of one setting."""

    labels: Labels
    metrics: Mapping[str, Spread]
    """Without those that no run measured."""
    num_runs: int

    def median(self, metric: str) -> float | None:
        spread = self.metrics.get(metric)
        return None if spread is None else spread.median

    def matches(self, labels: Labels) -> bool:
        return all(self.labels.get(name) == value for name, value in labels.items())


def aggregate(runs: Iterable[tuple[Labels, Metrics]]) -> list[Row]:
    """One row for all runs with equal labels, in the order in which settings first appear."""
    together: dict[tuple[tuple[str, Label], ...], list[Metrics]] = {}
    for labels, metrics in runs:
        together.setdefault(tuple(labels.items()), []).append(metrics)
    return [Row(dict(key), _spreads(metrics), len(metrics)) for key, metrics in together.items()]


def _spreads(runs: Sequence[Metrics]) -> dict[str, Spread]:
    names = dict.fromkeys(name for run in runs for name in run)
    values = {name: [value for run in runs if (value := run.get(name)) is not None] for name in names}
    return {
        name: Spread(statistics.median(found), min(found), max(found))
        for name, found in values.items()
        if found
    }


def select(rows: Iterable[Row], **labels: Label) -> list[Row]:
    return [row for row in rows if row.matches(labels)]


def contest(rows: Iterable[Row]) -> list[Row]:
    """Without the bounds: what was run."""
    return [row for row in rows if row.labels[POLICY] != BOUND]


def distinct(rows: Iterable[Row], label: str) -> list[Label]:
    """The values of a label, in the order of the rows."""
    return list(dict.fromkeys(row.labels[label] for row in rows if label in row.labels))


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a grid: all that was run with the same labels but for the policy."""

    labels: Labels
    by_policy: Mapping[str, Row]


def points(rows: Iterable[Row]) -> list[Point]:
    together: dict[tuple[tuple[str, Label], ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple((name, value) for name, value in row.labels.items() if name != POLICY)
        together.setdefault(key, {})[str(row.labels[POLICY])] = row
    return [Point(dict(key), by_policy) for key, by_policy in together.items()]
