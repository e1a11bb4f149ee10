"""`lemix plan`: how many nodes a load needs, by the search of the frontier."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from lemix.printing import say
from lemix.studies.command import progress_of
from lemix.studies.demand import SEEDS, Demand, round_s
from lemix.studies.exploring import Explorer
from lemix.studies.grid import Cell, Report, Study
from lemix.studies.measures import number, percent
from lemix.studies.rows import BOUND, Row, aggregate, select
from lemix.studies.runner import RunLog, finished_runs, process_pool
from lemix.studies.runs import least_nodes, run_cell, share_alone
from lemix.studies.searching import KEPT_ENOUGH, Steps, fewest_nodes, highest_rate
from lemix.studies.tables import spread
from lemix.studies.verdicts import SLO
from lemix.studies.while_serving import KEPT
from shared.errors import ConfigurationError

MARGINS = (1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0)
"""Multiples of the rate that are tried on the nodes that were found."""
RATE = "rate"
_STUDY = Study(name="plan", title="", about="", run=run_cell, report=lambda rows: Report())
"""The shape in which runs are made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """A load, and what is wanted under it. Raises ConfigurationError naming the option that is wrong."""

    demand: Demand
    in_time: float
    """Share of the requests."""
    policy: str = "lemix"
    most_nodes: int = 32
    seeds: Sequence[int] = SEEDS
    workers: int | None = None
    """Runs at the same time; None: as many as there are cores."""

    def __post_init__(self) -> None:
        demand = self.demand
        _check(demand.rate_per_s > 0, "rate", demand.rate_per_s, "above 0")
        _check(demand.training_tokens_per_s >= 0, "training", demand.training_tokens_per_s, "at least 0")
        _check(0 < self.in_time <= 1, "in_time", self.in_time, "a share above 0 and at most 1")


def _check(is_right: bool, name: str, value: float, wanted: str) -> None:
    if not is_right:
        raise ConfigurationError(f"{name} must be {wanted}, not {value:g}")


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search."""

    nodes: int | None
    """None: more than were tried."""
    rate_per_s: float
    """The highest that was tried and is still enough."""


def run_plan(options: PlanOptions, console: Console) -> None:
    """Search, and say how many nodes are needed.

    Raises ConfigurationError when no number of nodes, or none that was tried, can do what is asked.
    """
    check_possible(options)
    with TemporaryDirectory(prefix="lemix-plan-") as folder, progress_of(console) as progress:
        bar = progress.add_task("simulating", total=None)
        study, log = _STUDY, RunLog(Path(folder) / "plan.jsonl")
        explorer = Explorer(
            study,
            [plan_search(options)],
            log,
            pool=process_pool(study, options.workers),
            on_run=lambda made: progress.update(bar, completed=made),
        )
        cells = explorer.explore()
        rows = aggregate(finished_runs(replace(study, cells=cells), log))
    (found,) = explorer.found
    assert isinstance(found, Found)
    for line in answer(options, found, rows):
        say(console, line)


def check_possible(options: PlanOptions) -> None:
    """Raises ConfigurationError when too few requests could be in time with a node to themselves."""
    demand = options.demand
    alone, least_tbt_s = share_alone(_runs(options, BOUND, 1, 1.0)[0]), round_s(demand.profile)
    if alone < options.in_time:
        raise ConfigurationError(
            f"no number of nodes is enough: {percent(alone)} % of the requests can be in time with a node to"
            f" themselves, and {percent(options.in_time)} % are asked for; the objective is too short"
        )
    if demand.tbt_p99_s is not None and demand.tbt_p99_s < least_tbt_s:
        raise ConfigurationError(
            f"no number of nodes is enough: a token takes {1000 * least_tbt_s:.1f} ms with a node to itself,"
            f" and at most {1000 * demand.tbt_p99_s:g} ms are asked for"
        )


def plan_search(options: PlanOptions) -> Steps[Found]:
    """The fewest nodes, then the highest rate that they bear."""
    objective = options.demand.objective(options.in_time)
    low = lowest(options)
    nodes = yield from fewest_nodes(
        [objective], lambda nodes: _runs(options, options.policy, nodes, 1.0), low, options.most_nodes
    )
    if nodes is None:
        return Found(None, 0.0)
    margin = yield from highest_rate(
        objective, lambda step: _runs(options, options.policy, nodes, MARGINS[step]), len(MARGINS)
    )
    return Found(nodes, options.demand.rate_per_s * MARGINS[margin or 0])


def lowest(options: PlanOptions) -> int:
    """No policy gets by on fewer with any of the seeds."""
    return min(
        least_nodes(cell, in_time=options.in_time, kept=KEPT_ENOUGH) for cell in _runs(options, BOUND, 1, 1.0)
    )


def _runs(options: PlanOptions, policy: str, nodes: int, margin: float) -> list[Cell]:
    rate_per_s = options.demand.rate_per_s * margin
    demand = replace(options.demand, rate_per_s=rate_per_s)
    return demand.runs(policy, nodes, options.seeds, {RATE: rate_per_s})


def answer(options: PlanOptions, found: Found, rows: Sequence[Row]) -> Iterator[str]:
    """The lines that a person reads. Raises ConfigurationError when too few nodes were tried."""
    demand = options.demand
    if found.nodes is None:
        (tried,) = select(rows, nodes=options.most_nodes)
        raise ConfigurationError(
            f"{options.most_nodes} nodes are not enough: {reached(tried)}; --most-nodes tries more"
        )
    (at,) = select(rows, nodes=found.nodes, **{RATE: demand.rate_per_s})
    yield (
        f"{found.nodes} nodes of {demand.profile} under {options.policy}: {demand.rate_per_s:g} requests/s,"
        f" {demand.training_tokens_per_s:g} training tokens/s, {percent(options.in_time)} % in time"
    )
    yield f"  reached: {reached(at)}"
    more = " or more" if found.rate_per_s >= demand.rate_per_s * MARGINS[-1] else ""
    yield f"  margin: they bear {number(found.rate_per_s)} requests/s{more} with the same training"
    for row in rows:
        if row.labels["nodes"] == found.nodes - 1:
            yield f"  with one fewer: {reached(row)}"
    yield f"  bound: no policy gets by on fewer than {lowest(options)}"
    yield (
        f"  simulated: seeds {', '.join(map(str, options.seeds))}, {demand.workload.num_requests} requests"
        " each; medians, then lowest to highest"
    )


def reached(row: Row) -> str:
    """The numbers of a setting, as medians with ranges."""
    parts = [f"{spread(row.metrics.get(SLO), percent)} % in time"]
    if KEPT in row.metrics:
        parts.append(f"{spread(row.metrics[KEPT], percent)} % of the training kept")
    if (tbt := row.metrics.get("tbt_p99_s")) is not None:
        parts.append(f"TBT p99 {spread(tbt, lambda value: f'{1000 * value:.1f}')} ms")
    return ", ".join(parts)
