"""Generation: requests that want many tokens, beside training of several batch sizes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lemix.studies import paper
from lemix.studies.charts import chart_by
from lemix.studies.grid import Cell, Report, Study
from lemix.studies.measures import SLO_ATTAINMENT, TASKS_PER_NODE_S, TBT, TRAINING_TOKENS, TTFT
from lemix.studies.rows import POLICY, Row, Spread, contest, distinct, points, select
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
gpt2-large on four nodes with 1F1B and with GPipe (two microbatches), and llama2-13b with 1F1B; training rate
{TRAINING_RATE}, requests of one sequence of at most {MAX_LENGTH} tokens, and a KV cache of {KV_TOKENS} tokens
a node, as in the paper. A request wants {MAX_TOKENS[0]} to {MAX_TOKENS[1]} tokens, each number as likely (the
paper generates until the model ends; ours computes nothing that could end). Rates are swept with training
batches of {MIDDLE_BATCH_SIZE}; batch sizes at {MIDDLE_RATE} requests per second, for the first system alone.
TTFT counts from arrival, queueing included; the paper's leaves queueing out. `paper: ...` rows are read from
its figures (±1 %), of its own devices."""


@dataclass(frozen=True, slots=True)
class System:
    """A model under a schedule."""

    name: str
    model: str
    schedule: str
    microbatches: int


SYSTEMS = (
    System("gpt2-large, 1F1B", "gpt2-large", "1f1b", 1),
    System("gpt2-large, GPipe", "gpt2-large", "gpipe", 2),
    System("llama2-13b, 1F1B", "llama2-13b", "1f1b", 1),
)
QUICK_SYSTEMS = (System("gpt2-small, 1F1B", "gpt2-small", "1f1b", 1),)


def generation(*, quick: bool) -> Study:
    rates = (JUDGED_RATE,) if quick else RATES
    systems = QUICK_SYSTEMS if quick else SYSTEMS
    places = [(system, rate, MIDDLE_BATCH_SIZE) for system in systems for rate in rates]
    if not quick:
        places += [(systems[0], MIDDLE_RATE, size) for size in BATCH_SIZES]
    cells = [
        cell(
            replace(CLASSES[system.model], batch_size=batch_size),
            contender,
            Load(rate_per_s=rate, training_rate=TRAINING_RATE, num_tasks=num_tasks(quick)),
            seed=seed,
            labels={"system": system.name, "rate": rate, "batch": batch_size},
            cluster={
                "schedule": system.schedule,
                "trainer_settings": {"microbatches": system.microbatches},
                "stage_settings": {"kv_tokens": KV_TOKENS},
            },
            workload={"request_size": 1, "max_length": MAX_LENGTH, "max_tokens": MAX_TOKENS},
        )
        for system, rate, batch_size in dict.fromkeys(places)
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
    systems = [str(name) for name in distinct(rows, "system")]
    by_rate = select(rows, batch=MIDDLE_BATCH_SIZE)
    by_batch = select(rows, rate=MIDDLE_RATE, system=systems[0])
    beside = [*by_rate, *paper_rows(select(by_rate, system=systems[0]))]
    sections = [
        section
        for name in systems
        for section in sections_by(select(beside, system=name), "rate", MEASURES, f": {name}")
    ]
    charts = {"by-rate": chart_by(contest(beside), "rate", MEASURES, "system")}
    if len(distinct(by_batch, "batch")) > 1:
        sections += sections_by(by_batch, "batch", MEASURES, f": {systems[0]}")
        charts["by-batch"] = chart_by(contest(by_batch), "batch", MEASURES)
    return Report(sections=sections, verdicts=verdicts(rows), charts=charts)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    at = points(contest(rows))
    where = {"system": distinct(rows, "system")[0], "rate": JUDGED_RATE, "batch": MIDDLE_BATCH_SIZE}
    ratios = [
        ratio_verdict(at, metric, most, where)
        for metric, most in (
            (TTFT.metric, paper.HEADLINE_GENERATION["ttft_s"]),
            (TBT.metric, paper.HEADLINE_GENERATION["tbt_s"]),
        )
    ]
    return [*ratios, all_applied(at)]


def paper_rows(rows: Sequence[Row]) -> list[Row]:
    """The paper's numbers at our rates, of the system that has the paper's model."""
    there = {row.labels["rate"] for row in rows}
    system = distinct(rows, "system")[0]
    found: dict[tuple[str, int], dict[str, Spread]] = {}
    for metric, measure in (("ttft_s", TTFT), ("tbt_s", TBT)):
        for policy, by_rate in paper.GENERATION[metric].items():
            for rate, value in by_rate.items():
                if rate in there:
                    spread = Spread(value, value, value)
                    found.setdefault((policy, rate), {})[measure.metric] = spread
    return [
        Row({"system": system, "rate": rate, POLICY: f"paper: {policy}"}, metrics, 0)
        for (policy, rate), metrics in found.items()
    ]
