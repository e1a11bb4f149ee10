"""Recorded requests at several rates, from a file that the project neither has nor needs."""

from collections.abc import Sequence
from pathlib import Path

from lemix.simulation.trace import read_trace
from lemix.studies.charts import chart_by
from lemix.studies.demand import DEVICES, SEEDS, Demand, round_s
from lemix.studies.grid import Report, Study, grid
from lemix.studies.measures import (
    FORECAST_ERROR,
    IN_TIME_RATE,
    SLO_ATTAINMENT,
    TBT_P99,
    TRAINING_KEPT,
)
from lemix.studies.rows import BOUND, Row, contest, points
from lemix.studies.runs import run_cell
from lemix.studies.setting import CLASSES, NODES
from lemix.studies.tables import sections_by
from lemix.studies.verdicts import FORECAST_ERRORS, LEMIX, forecast_error, slo_near_best

RATES = (2, 5, 10)
NUM_REQUESTS = 300
TRAINING_TOKENS_PER_S = 1_720
TRACE_SEEDS = SEEDS[:3]
"""They vary the training, and the devices' noise: the requests are the file's."""
POLICIES = (LEMIX, "least_loaded", "round_robin", "separate:split=0.25", "separate:split=0.5", BOUND)
MEASURES = (SLO_ATTAINMENT, TBT_P99, IN_TIME_RATE, TRAINING_KEPT, FORECAST_ERROR)


def real_trace(trace: Path, *, quick: bool) -> Study:
    """Raises ConfigurationError naming the file and the line that is no request."""
    rows, model = read_trace(trace, limit=20 if quick else NUM_REQUESTS), CLASSES["llama2-13b"]
    cells = [
        cell
        for labels in grid(rate=RATES[:1] if quick else RATES)
        for policy in POLICIES[: 2 if quick else None]
        for cell in Demand(
            profile=model.profile,
            rate_per_s=float(labels["rate"]),
            training_tokens_per_s=TRAINING_TOKENS_PER_S,
            tbt_p99_s=2 * round_s(model.profile),
            trace=rows,
            cluster=DEVICES,
        ).runs(policy, NODES, TRACE_SEEDS[:1] if quick else TRACE_SEEDS, {"class": model.name, **labels})
    ]
    return Study(
        name="trace",
        title="Recorded requests",
        about=_about(trace, len(rows)),
        cells=cells,
        run=run_cell,
        report=report,
    )


def _about(trace: Path, num_requests: int) -> str:
    return f"""\
The first {num_requests} requests of {trace.name}, stretched in time to each rate, on four nodes of llama2-13b
with noise and a table of their own, beside {TRAINING_TOKENS_PER_S} training tokens per second. What is
longer than the model reads is cut. The objective for the first token grows with the prompt; that between
tokens is two rounds of one token alone. No default was ever chosen on recorded requests."""


def report(rows: Sequence[Row]) -> Report:
    ran = points(contest(rows))
    return Report(
        sections=sections_by(rows, "rate", MEASURES),
        verdicts=[
            slo_near_best(ran),
            forecast_error(ran, FORECAST_ERRORS[1], "of response times"),
        ],
        charts={"by-rate": chart_by(contest(rows), "rate", MEASURES[:3])},
    )
