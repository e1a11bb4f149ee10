"""Generation: requests that want many tokens, beside training of several batch sizes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from lemix.studies import paper
from lemix.studies.charts import chart_by
from lemix.studies.grid import Cell, Report, Study
from lemix.studies.measures import SLO_ATTAINMENT, TASKS_PER_NODE_S, TBT, TRAINING_TOKENS, TTFT
from lemix.studies.rows import POLICY, Row, Spread, contest, points, select
from lemix.studies.runs import run_cell
from lemix.studies.setting import CLASSES, CONTENDERS, ESSENTIAL, LIMIT, Load, cell, num_tasks, seeds
from lemix.studies.tables import sections_by
from lemix.studies.verdicts import Verdict, all_applied, ratio_verdict

RATES = tuple(range(8, 33, 4))
BATCH_SIZES = (1, 2, 3, 4, 5)
MIDDLE_RATE = 20
MIDDLE_BATCH_SIZE = 3
TRAINING_RATE = 0.5
JUDGED_RATE = 8
MAX_LENGTH = 128
"""Tokens of a sequence, generated ones included."""
MAX_TOKENS = (10, 64)
KV_TOKENS = 1_000
"""Room in a node's cache."""
MEASURES = (TTFT, TBT, SLO_ATTAINMENT, TASKS_PER_NODE_S, TRAINING_TOKENS)
ABOUT = f"""\
gpt2-large on four nodes, synchronous, training rate {TRAINING_RATE}, requests of one sequence of at most
{MAX_LENGTH} tokens, and a KV cache of {KV_TOKENS} tokens a node, as in the paper. A request wants
{MAX_TOKENS[0]} to {MAX_TOKENS[1]} tokens, each number as likely (the paper generates until the model
ends; ours computes nothing that could end). Rates are swept with training batches of
{MIDDLE_BATCH_SIZE}, batch sizes at {MIDDLE_RATE} requests per second. TTFT counts from arrival, queueing
included; the paper's leaves queueing out. `paper: ...` rows are read from its figures (±1 %), of its own
devices."""


def generation(*, quick: bool) -> Study:
    rates = (JUDGED_RATE,) if quick else RATES
    batch_sizes = () if quick else BATCH_SIZES
    model = CLASSES["gpt2-small" if quick else "gpt2-large"]
    places = dict.fromkeys(
        [(rate, MIDDLE_BATCH_SIZE) for rate in rates] + [(MIDDLE_RATE, size) for size in batch_sizes]
    )
    cells = [
        cell(
            replace(model, batch_size=batch_size),
            contender,
            Load(rate_per_s=rate, training_rate=TRAINING_RATE, num_tasks=num_tasks(quick)),
            seed=seed,
            labels={"class": model.name, "rate": rate, "batch": batch_size},
            cluster={"schedule": "1f1b", "stage_settings": {"kv_tokens": KV_TOKENS}},
            workload={"request_size": 1, "max_length": MAX_LENGTH, "max_tokens": MAX_TOKENS},
        )
        for rate, batch_size in places
        for contender in (*(ESSENTIAL if quick else CONTENDERS), LIMIT)
        for seed in seeds(quick)
    ]
    return Study(
        name="generation",
        title="Generation",
        about=ABOUT,
        cells=cells,
        run=run_cell,
        report=report,
        timelines=_timelines(cells),
    )


def _timelines(cells: Iterable[Cell]) -> list[Cell]:
    """A short run of LeMix."""
    first = next(iter(cells))
    return [replace(first, workload=replace(first.workload, num_tasks=num_tasks(quick=True)))]


def report(rows: Sequence[Row]) -> Report:
    by_rate = select(rows, batch=MIDDLE_BATCH_SIZE)
    by_batch = select(rows, rate=MIDDLE_RATE)
    beside = [*by_rate, *paper_rows(by_rate)]
    sections = sections_by(beside, "rate", MEASURES)
    charts = {"by-rate": chart_by(contest(beside), "rate", MEASURES)}
    if by_batch:
        sections += sections_by(by_batch, "batch", MEASURES)
        charts["by-batch"] = chart_by(contest(by_batch), "batch", MEASURES)
    return Report(sections=sections, verdicts=verdicts(rows), charts=charts)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    at = points(contest(rows))
    where = {"rate": JUDGED_RATE, "batch": MIDDLE_BATCH_SIZE}
    ratios = [
        ratio_verdict(at, metric, most, where)
        for metric, most in (
            (TTFT.metric, paper.HEADLINE_GENERATION["ttft_s"]),
            (TBT.metric, paper.HEADLINE_GENERATION["tbt_s"]),
        )
    ]
    return [*ratios, all_applied(at)]


def paper_rows(rows: Sequence[Row]) -> list[Row]:
    """The paper's numbers at our rates."""
    there = {row.labels["rate"] for row in rows}
    found: dict[tuple[str, int], dict[str, Spread]] = {}
    for metric, measure in (("ttft_s", TTFT), ("tbt_s", TBT)):
        for policy, by_rate in paper.GENERATION[metric].items():
            for rate, value in by_rate.items():
                if rate in there:
                    spread = Spread(value, value, value)
                    found.setdefault((policy, rate), {})[measure.metric] = spread
    return [
        Row({"rate": rate, POLICY: f"paper: {policy}"}, metrics, 0)
        for (policy, rate), metrics in found.items()
    ]
