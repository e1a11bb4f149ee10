"""The paper's grid of rates, training rates, models and policies: A-PP (`main`), S-PP, data parallelism."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lemix.studies import paper
from lemix.studies.charts import Chart, chart_by
from lemix.studies.grid import Cell, Report, Section, Study, grid
from lemix.studies.measures import (
    IDLE_SHARE,
    SLO_ATTAINMENT,
    TASKS_PER_NODE_S,
    TRAINING_TOKENS,
    number,
)
from lemix.studies.rows import POLICY, Label, Row, Spread, contest, distinct, points, select
from lemix.studies.runs import run_cell
from lemix.studies.setting import (
    AS_IN_THE_PAPER,
    CLASSES,
    CONTENDERS,
    ESSENTIAL,
    GPT_CLASSES,
    LIMIT,
    LLAMA_CLASSES,
    RIVALS,
    Contender,
    Load,
    ModelClass,
    cell,
    num_tasks,
    seeds,
)
from lemix.studies.tables import sections_by, table
from lemix.studies.verdicts import (
    IN_TIME,
    PAPERS_SEPARATE,
    SEPARATE,
    SLO,
    THROUGHPUT,
    Verdict,
    main_verdicts,
    possible_throughput_ratio,
)

BETWEEN = (12, 20, 28)
"""Requests per second that the paper runs and its figures leave out."""
BEYOND = (128,)
"""Requests per second above the paper's grid: where LeMix should say where it ends."""
COARSE_RATES = (4, 16, 32, *BEYOND)
COARSE_TRAINING_RATES = (0.1, 0.5, 0.9)
"""Training rates at which policies that rival nobody are run too."""
MIDDLE_RATE = 16
MIDDLE_TRAINING_RATE = 0.5
"""The paper does not say what its sweeps keep fixed; these are the middles of its grid."""


THROUGHPUT_BOUNDS = (THROUGHPUT, THROUGHPUT + IN_TIME)
SHOWN = (SLO_ATTAINMENT, TASKS_PER_NODE_S, TRAINING_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """One of the paper's three grids."""

    name: str
    title: str
    about: str
    classes: Sequence[ModelClass]
    rates: Sequence[int]
    cluster: Callable[[ModelClass], Mapping[str, Any]]
    """Options of the cluster that all runs of a class share."""
    paper_schedule: str = ""
    """Whose numbers of the paper stand beside ours."""
    training_rates: Sequence[float] = field(default=paper.TRAINING_RATES)
    sweeps_only: bool = False
    """Only what the paper draws: rates at the middle training rate, training rates at the middle rate."""

    def study(self, *, quick: bool) -> Study:
        return Study(
            name=self.name,
            title=self.title,
            about=self.about,
            cells=list(self._cells(quick)),
            run=run_cell,
            report=partial(report, paper_schedule=self.paper_schedule),
            timelines=list(self._timelines(quick)),
        )

    def _cells(self, quick: bool) -> Iterable[Cell]:
        classes = self.classes[:1] if quick else self.classes
        rates = (MIDDLE_RATE,) if quick else self.rates
        training_rates = (MIDDLE_TRAINING_RATE,) if quick else self.training_rates
        for labels in grid(
            **{"class": [model.name for model in classes]}, rate=rates, training_rate=training_rates
        ):
            if self.sweeps_only and not _is_on_a_sweep(labels):
                continue
            for contender in (*(ESSENTIAL if quick else _contenders(labels)), LIMIT):
                for seed in seeds(quick):
                    yield self._cell(labels, contender, seed, num_tasks(quick))

    def _cell(self, labels: Mapping[str, Label], contender: Contender, seed: int, tasks: int) -> Cell:
        model = CLASSES[str(labels["class"])]
        load = Load(
            rate_per_s=float(labels["rate"]), training_rate=float(labels["training_rate"]), num_tasks=tasks
        )
        return cell(model, contender, load, seed=seed, labels=labels, cluster=self.cluster(model))

    def _timelines(self, quick: bool) -> Iterable[Cell]:
        """A short run of the middle of the grid under each essential policy."""
        drawn = LLAMA_CLASSES[0] if LLAMA_CLASSES[0] in self.classes and not quick else self.classes[0]
        labels: dict[str, Label] = {
            "class": drawn.name,
            "rate": MIDDLE_RATE,
            "training_rate": MIDDLE_TRAINING_RATE,
        }
        for contender in ESSENTIAL[:1] if quick else ESSENTIAL:
            yield self._cell(labels, contender, 0, num_tasks(quick=True))


def _is_on_a_sweep(labels: Mapping[str, Label]) -> bool:
    return labels["rate"] == MIDDLE_RATE or labels["training_rate"] == MIDDLE_TRAINING_RATE


def _contenders(labels: Mapping[str, Label]) -> Sequence[Contender]:
    is_coarse = labels["rate"] in COARSE_RATES and labels["training_rate"] in COARSE_TRAINING_RATES
    return CONTENDERS if is_coarse else RIVALS


def report(rows: Sequence[Row], *, paper_schedule: str) -> Report:
    ran = contest(rows)
    shown = [*rows, *paper_rows(paper_schedule, rows)]
    return Report(
        sections=[*_possible(_within_the_paper(rows)), *_sections(shown)],
        verdicts=_verdicts(ran),
        charts=dict(_charts(contest(shown))),
    )


def _within_the_paper(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.labels["rate"] not in BEYOND]


def _verdicts(ran: Sequence[Row]) -> list[Verdict]:
    """Verdicts on the paper's grid, then those beyond it."""
    beyond = [
        replace(verdict, criterion=f"at {rate} requests per second: {verdict.criterion}")
        for rate in BEYOND
        if (there := select(ran, rate=rate))
        for verdict in main_verdicts(points(there))
        if verdict.findings
    ]
    return main_verdicts(points(_within_the_paper(ran))) + beyond


def _possible(rows: Sequence[Row]) -> Iterable[Section]:
    """Compare the bounds with the paper's headline."""
    at = points(rows)
    lines = [
        [family, *("" if most is None else number(most) for most in ratios)]
        for family in (SEPARATE, PAPERS_SEPARATE)
        if any(ratios := [possible_throughput_ratio(at, bound, family) for bound in THROUGHPUT_BOUNDS])
    ]
    if lines:
        head = ["highest possible ratio of tasks per node-second to", "any run", "all requests in time"]
        yield Section(title="What is possible on this grid", body=table(head, lines))


def _sections(rows: Sequence[Row]) -> Iterable[Section]:
    """For each class: by rate at the middle training rate, and the other way round."""
    for name in distinct(rows, "class"):
        of_class = select(rows, **{"class": name})
        for across, fixed in _sweeps():
            yield from sections_by(select(of_class, **fixed), across, SHOWN, f": {name}, {_words(fixed)}")


def _sweeps() -> tuple[tuple[str, dict[str, Label]], ...]:
    return (("rate", {"training_rate": MIDDLE_TRAINING_RATE}), ("training_rate", {"rate": MIDDLE_RATE}))


def _words(fixed: Mapping[str, Label]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fixed.items())


def _charts(rows: Sequence[Row]) -> Iterable[tuple[str, Chart]]:
    for family, classes in (("gpt", GPT_CLASSES), ("llama", LLAMA_CLASSES)):
        names = {model.name for model in classes}
        of_family = [row for row in rows if row.labels["class"] in names]
        for across, fixed in _sweeps() if of_family else ():
            shown = select(of_family, **fixed)
            words = f" ({_words(fixed)})"
            yield f"{family}-by-{across}", chart_by(shown, across, (*SHOWN, IDLE_SHARE), "class", words)


PAPER_FIGURES = (
    (paper.SLO_BY_TRAINING_RATE, SLO, 0.01, "training_rate", paper.TRAINING_RATES),
    (paper.SLO_BY_RATE, SLO, 0.01, "rate", paper.RATES),
    (paper.THROUGHPUT, THROUGHPUT, 1.0, "rate", paper.RATES),
)
"""Each with its metric here, its unit in ours, and what varies in it. Of a point in two figures the later
counts.
"""


def paper_rows(schedule: str, rows: Sequence[Row]) -> list[Row]:
    """The paper's numbers at the points of ours, as rows of policies of their own."""
    there = {(row.labels["class"], row.labels["rate"], row.labels["training_rate"]) for row in rows}
    found: dict[tuple[str, Label, Label, str], dict[str, Spread]] = {}
    for figure, metric, unit, varied, xs in PAPER_FIGURES:
        for (of, policy, model), values in figure.items():
            for x, value in zip(xs, values, strict=True):
                at = {"rate": MIDDLE_RATE, "training_rate": MIDDLE_TRAINING_RATE, varied: x}
                point = (model, at["rate"], at["training_rate"])
                if of == schedule and point in there:
                    spread = Spread(value * unit, value * unit, value * unit)
                    found.setdefault((*point, f"paper: {policy}"), {})[metric] = spread
    names = ("class", "rate", "training_rate", POLICY)
    return [Row(dict(zip(names, key, strict=True)), metrics, 0) for key, metrics in found.items()]


ABOUT_MAIN = f"""\
Rates are 4 to 32 requests per second as in the paper, and 128 beyond it; training rates are 0.1 to 0.9.
There are 334 tasks. GPT trains on batches of three sequences; a request is one, where the paper's are three.
Each training batch is released when its predecessor has passed stage 0. All policies run on stages that let
inference overtake training (`slo_first`). `round_robin (fifo)` is Mix-RR on stages as in the paper. It,
`lemix_released`, `random` and the dynamic split run at every other point only.
`{AS_IN_THE_PAPER.label}` is Separate as in the paper; it also gets other splits, so that LeMix is
compared with the best of them. Only headlines of the paper's A-PP grid are known: up to
{paper.HEADLINE_THROUGHPUT} times Separate's throughput and {paper.HEADLINE_SLO} times its SLO attainment."""
ABOUT_SYNCHRONOUS = """\
There is a flush after each training batch, on four nodes of GPT or two of Llama, as in the paper. These are
the paper's two sweeps: of rates at training rate 0.5, and of training rates at 16 requests per second.
`paper: ...` rows are read from its figures (±1 %), which do not say what each sweep kept fixed. Its devices
and its software took other times than ours: the order can be compared, the level hardly."""
ABOUT_DATA_PARALLEL = """\
GPT runs on eight nodes of one stage each, synchronously, in the paper's two sweeps. The paper's replicas are
never averaged; nor are ours here. `paper: ...` rows are read from its figures (±1 %); their order can be
compared with ours, their level hardly."""

MAIN = Grid(
    name="main",
    title="Main grid: A-PP on four nodes",
    about=ABOUT_MAIN,
    classes=(*GPT_CLASSES, *LLAMA_CLASSES),
    rates=(*sorted((*paper.RATES, *BETWEEN)), *BEYOND),
    cluster=lambda model: {"schedule": "async"},
)
SYNCHRONOUS = Grid(
    name="synchronous",
    title="Synchronous pipelines: S-PP",
    about=ABOUT_SYNCHRONOUS,
    classes=(*GPT_CLASSES, *LLAMA_CLASSES),
    rates=paper.RATES,
    cluster=lambda model: {"schedule": "1f1b", "nodes": 4 if model in GPT_CLASSES else 2},
    paper_schedule="S-PP",
    sweeps_only=True,
)
DATA_PARALLEL = Grid(
    name="data-parallel",
    title="Data parallelism: eight nodes of one stage",
    about=ABOUT_DATA_PARALLEL,
    classes=GPT_CLASSES,
    rates=paper.RATES,
    cluster=lambda model: {"schedule": "1f1b", "nodes": 8, "stages": 1},
    paper_schedule="DP",
    sweeps_only=True,
)
