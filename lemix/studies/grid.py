"""A study: the runs to make, and how to report their results."""

import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from pydantic_core import to_jsonable_python

from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.workload import WorkloadOptions
from lemix.studies.bars import Bars
from lemix.studies.charts import Chart
from lemix.studies.rows import POLICY, Label, Labels, Metrics, Row
from lemix.studies.verdicts import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run."""

    labels: Labels
    """The setting's names in tables; equal for the seeds of one setting."""
    cluster: SimulationOptions
    workload: WorkloadOptions
    extra: Mapping[str, Label] = field(default_factory=dict)
    """Other options that decide the result."""

    @property
    def policy(self) -> str:
        return str(self.labels[POLICY])

    def options(self) -> dict[str, Any]:
        """All that decides the result, as JSON; two cells with equal options are one run."""
        found: dict[str, Any] = to_jsonable_python(
            {"cluster": self.cluster, "workload": self.workload, **self.extra}
        )
        return found

    def key(self) -> str:
        return json.dumps(self.options(), sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A table with a heading, in Markdown."""

    title: str
    body: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The report of a study."""

    sections: Sequence[Section] = ()
    verdicts: Sequence[Verdict] = ()
    charts: Mapping[str, Chart | Bars] = field(default_factory=dict)
    """By the end of the file's name."""
    looked_up: Sequence[Row] = ()
    """Rows that missed points are looked up in; none: in all of the study."""


RunCell = Callable[[Cell], Metrics]
"""Makes one run, in a process of its own (so a function of a module)."""


Search = Generator[Sequence[Cell], Sequence[Metrics], object]
"""Yields the runs that it wants next, and is sent the metrics of each; returns what it found."""


@dataclass(frozen=True, slots=True)
class PolicySearch:
    """A search among the runs of one policy."""

    policy: str
    begin: Callable[[], Search]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One study, quick or full."""

    name: str
    title: str
    about: str
    """The varied and the fixed options, and the paper's experiment; Markdown."""
    cells: Sequence[Cell] = ()
    """Runs that are made in any case."""
    report: Callable[[Sequence[Row]], Report]
    run: RunCell
    searches: Sequence[PolicySearch] = ()
    """They choose further runs, each by what the ones before it showed."""
    timelines: Sequence[Cell] = ()
    """Runs whose pipelines are drawn."""
    max_workers: int | None = None
    """Runs at the same time; None: as many as there are cores."""


def grid(**axes: Iterable[Label]) -> list[dict[str, Label]]:
    """Every combination, the last axis fastest."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
