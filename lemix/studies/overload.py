"""Overload: more requests come than four nodes can serve, beside training that they could do."""

from collections.abc import Iterator, Sequence

from lemix.studies.charts import chart_by
from lemix.studies.demand import DEVICES, SEEDS, Demand
from lemix.studies.grid import Report, Study, grid
from lemix.studies.measures import (
    IN_TIME_RATE,
    NOT_ANSWERED,
    SLO_ATTAINMENT,
    TRAINING_KEPT,
    TRAINING_WHILE_SERVING,
)
from lemix.studies.rows import BOUND, POLICY, Row, contest, points
from lemix.studies.runs import run_cell
from lemix.studies.setting import CLASSES, NODES
from lemix.studies.tables import sections_by
from lemix.studies.verdicts import LEMIX, Finding, Verdict
from lemix.studies.while_serving import IN_TIME_PER_S
from services.scheduler.objectives import Objectives

CAPACITY_PER_S = 132
"""Requests per second of llama2-13b that four nodes serve 95 % in time of, beside this training."""
TRAINING_TOKENS_PER_S = 1_720
FACTORS = (1, 1.5, 2, 5)
SECONDS = 5.0
"""So long requests arrive: 37 objectives."""
QUICK_SECONDS = 0.2
POLICIES = (LEMIX, "least_loaded", "round_robin", "separate:split=0.25", "separate:split=0.5", BOUND)
QUICK_POLICIES = (LEMIX, "round_robin", BOUND)
MEASURES = (IN_TIME_RATE, SLO_ATTAINMENT, NOT_ANSWERED, TRAINING_WHILE_SERVING, TRAINING_KEPT)
IN_TIME_OF_MOST = 0.9
ABOUT = f"""\
llama2-13b on four nodes with noise and a table of their own. Their capacity is {CAPACITY_PER_S} requests per
second beside {TRAINING_TOKENS_PER_S} training tokens per second. `factor` times the capacity arrives for
{SECONDS:g} s. Requests that cannot be in time may be refused (`when_late` is `refuse`). Requests in time and
training count while requests arrive. The bound is that of a clairvoyant scheduler without any training."""


def overload(*, quick: bool) -> Study:
    model = CLASSES["llama2-13b"]
    cells = [
        cell
        for labels in grid(factor=FACTORS[2:3] if quick else FACTORS)
        for policy in (QUICK_POLICIES if quick else POLICIES)
        for cell in Demand(
            profile=model.profile,
            rate_per_s=CAPACITY_PER_S * float(labels["factor"]),
            training_tokens_per_s=TRAINING_TOKENS_PER_S,
            num_requests=round(
                CAPACITY_PER_S * float(labels["factor"]) * (QUICK_SECONDS if quick else SECONDS)
            ),
            objectives=Objectives(when_late="refuse"),
            cluster=DEVICES,
        ).runs(policy, NODES, SEEDS[:1] if quick else SEEDS, {"class": model.name, **labels})
    ]
    return Study(name="overload", title="Overload", about=ABOUT, cells=cells, run=run_cell, report=report)


def report(rows: Sequence[Row]) -> Report:
    return Report(
        sections=sections_by(rows, "factor", MEASURES),
        verdicts=[near_the_most(rows), near_the_bound(rows)],
        charts={"by-factor": chart_by(contest(rows), "factor", (IN_TIME_RATE, TRAINING_WHILE_SERVING))},
    )


def near_the_most(rows: Sequence[Row]) -> Verdict:
    """Above capacity, as many requests in time as the share that is asked of the most there could be.

    That is the most that any policy reached at any factor; where fewer could be in time at all, those.
    """
    reached = [row.median(IN_TIME_PER_S) for row in rows if row.labels[POLICY] != BOUND]
    most = max((each for each in reached if each is not None), default=0.0)
    criterion = (
        f"above capacity, requests in time per second at least {IN_TIME_OF_MOST:g} of the most reached"
    )
    return Verdict(criterion, tuple(_findings(rows, most)))


def near_the_bound(rows: Sequence[Row]) -> Verdict:
    """The same of the bound, which has no training and no end to its batches."""
    criterion = f"above capacity, requests in time per second at least {IN_TIME_OF_MOST:g} of the bound"
    return Verdict(criterion, tuple(_findings(rows, float("inf"))))


def _findings(rows: Sequence[Row], most: float) -> Iterator[Finding]:
    for point in points(rows):
        bound, ours = (
            point.by_policy[policy].median(IN_TIME_PER_S) if policy in point.by_policy else None
            for policy in (BOUND, LEMIX)
        )
        if float(point.labels["factor"]) > 1 and bound is not None and ours is not None:
            needed = IN_TIME_OF_MOST * min(bound, most)
            yield Finding(point.labels, ours, needed, ours >= needed, BOUND, IN_TIME_PER_S)
