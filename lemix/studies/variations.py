"""Studies that vary one thing: length heterogeneity, LeMix's parts (ablation), its weights (sensitivity)."""

from collections.abc import Sequence

from lemix.studies import paper
from lemix.studies.charts import chart_by
from lemix.studies.grid import Report, Section, Study, grid
from lemix.studies.measures import (
    IDLE_SHARE,
    NODES_USED,
    SLO_ATTAINMENT,
    TASKS_PER_NODE_S,
    TRAINING_TOKENS,
    TTFT,
)
from lemix.studies.rows import Row, contest, distinct, points, select
from lemix.studies.runs import run_cell
from lemix.studies.setting import (
    CLASSES,
    CONTENDERS,
    ESSENTIAL,
    LIMIT,
    Contender,
    Load,
    cell,
    num_tasks,
    seeds,
)
from lemix.studies.tables import sections_by
from lemix.studies.verdicts import all_applied, slo_near_best, throughput_over_separate, undominated

TRAINING_RATE = 0.5
SHOWN = (SLO_ATTAINMENT, TASKS_PER_NODE_S, TRAINING_TOKENS)

SIGMAS = (200, 175, 150, 125, 100, 75, 50, 25, 10)
HETEROGENEITY_RATE = 50
ABOUT_HETEROGENEITY = f"""\
The paper's LH_study: gpt2-large on four nodes, {HETEROGENEITY_RATE} requests per second, training rate
{TRAINING_RATE}, lengths drawn around the data's mean with standard deviation sigma, in bursty order
(short and long alternate). The less lengths differ, the fewer holes far dependencies tear. The paper's
numbers are not public."""

ABLATION_RATES = (16, 32)
THRASHING = "no_memory_check"
"""Its nodes are restored again and again; a run takes fifty times as long as the others: one seed must do."""
TIGHT_PROFILE = "llama2-70b@a100"
"""Eight A100s hold weights and optimizer, and activations of some 240 tokens: memory has to be minded."""
ABLATED = (
    Contender("lemix"),
    Contender("no_prior_profile", "lemix:without=profile"),
    Contender("no_prioritization", "lemix", "fifo"),
    Contender(THRASHING, "lemix:without=memory"),
    Contender("no_idleness", "lemix:without=idleness"),
    Contender("no_consistency", "lemix:without=consistency"),
    Contender("no_consolidation", "lemix:without=consolidation"),
    Contender("no_deferral", "lemix:without=deferral"),
    Contender("paper's score", "lemix:score=paper"),
)
ABOUT_ABLATION = f"""\
{TIGHT_PROFILE} on four nodes, training rate {TRAINING_RATE}, without one part of LeMix at a time; five
seeds, {THRASHING} one. The first three are the paper's. no_prior_profile learns its costs from what runs.
no_prioritization serves stages in order of arrival (fifo). no_memory_check places whatever comes, so that
stages run out of memory and nodes are restored. The paper's results:

- no_prioritization: {paper.ABLATION["no_prioritization"]};
- no_memory_check: {paper.ABLATION["no_memory_check"]}."""

SENSITIVITY_RATES = (10, 20, 30)
SENSITIVITY_SEEDS = 1
WEIGHTS = (0.01, 0.05, 0.1, 0.15, 0.2, 0.5, 1)
PAPER_WEIGHTS = ("alpha", "beta", "epsilon")
OUR_WEIGHTS = ("idleness", "exposure", "beta", "comfort", "opening", "stretch", "late_share")
ABOUT_SENSITIVITY = f"""\
llama2-70b@h200 on four nodes, training rate {TRAINING_RATE}, {SENSITIVITY_SEEDS} seed, one weight at a
time; the others keep their defaults. alpha, beta and epsilon are the weights of the paper's score; the
rest are those of ours (docs/policy.md). A line that is flat says that the weight need not be tuned. The
paper's numbers are not public."""


def heterogeneity(*, quick: bool) -> Study:
    model = CLASSES["gpt2-small" if quick else "gpt2-large"]
    load = Load(rate_per_s=HETEROGENEITY_RATE, training_rate=TRAINING_RATE, num_tasks=num_tasks(quick))
    cells = [
        cell(
            model,
            contender,
            load,
            seed=seed,
            labels={"class": model.name, **labels},
            workload={"order": "bursty", "sigma": float(labels["sigma"])},
        )
        for labels in grid(sigma=SIGMAS[::8] if quick else SIGMAS)
        for contender in (*(ESSENTIAL if quick else CONTENDERS), LIMIT)
        for seed in seeds(quick)
    ]
    return Study(
        name="heterogeneity",
        title="Length heterogeneity",
        about=ABOUT_HETEROGENEITY,
        cells=cells,
        run=run_cell,
        report=_heterogeneity_report,
    )


def _heterogeneity_report(rows: Sequence[Row]) -> Report:
    ran = contest(rows)
    at = points(ran)
    return Report(
        sections=sections_by(rows, "sigma", (*SHOWN, IDLE_SHARE)),
        verdicts=[slo_near_best(at), throughput_over_separate(at), undominated(at), all_applied(at)],
        charts={"by-sigma": chart_by(ran, "sigma", (*SHOWN, IDLE_SHARE))},
    )


def ablation(*, quick: bool) -> Study:
    model = CLASSES["llama2-7b" if quick else "llama2-70b"]
    cells = [
        cell(
            model,
            contender,
            Load(rate_per_s=float(labels["rate"]), training_rate=TRAINING_RATE, num_tasks=num_tasks(quick)),
            seed=seed,
            labels={"class": model.name, **labels},
            cluster={} if quick else {"profile": TIGHT_PROFILE},
        )
        for labels in grid(rate=ABLATION_RATES[:1] if quick else ABLATION_RATES)
        for contender in ABLATED
        for seed in seeds(quick)[: 1 if contender.label == THRASHING else None]
    ]
    return Study(
        name="ablation",
        title="Ablation: LeMix without each of its parts",
        about=ABOUT_ABLATION,
        cells=cells,
        run=run_cell,
        report=_ablation_report,
    )


def _ablation_report(rows: Sequence[Row]) -> Report:
    measures = (*SHOWN, TTFT, NODES_USED)
    return Report(
        sections=sections_by(rows, "rate", measures),
        verdicts=[all_applied(points(rows))],
        charts={"by-rate": chart_by(rows, "rate", measures)},
    )


def sensitivity(*, quick: bool) -> Study:
    model = CLASSES["llama2-7b" if quick else "llama2-70b"]
    weights = (
        *(("paper", name, f"lemix:score=paper,{name}") for name in PAPER_WEIGHTS),
        *(("ours", name, f"lemix:{name}") for name in OUR_WEIGHTS),
    )
    cells = [
        cell(
            model,
            Contender(f"{score} {name}", f"{text}={labels['value']}"),
            Load(rate_per_s=float(labels["rate"]), training_rate=TRAINING_RATE, num_tasks=num_tasks(quick)),
            seed=seed,
            labels={"class": model.name, **labels},
        )
        for labels in grid(
            rate=SENSITIVITY_RATES[:1] if quick else SENSITIVITY_RATES,
            value=WEIGHTS[::6] if quick else WEIGHTS,
        )
        for score, name, text in (weights[::5] if quick else weights)
        for seed in seeds(quick)[:SENSITIVITY_SEEDS]
    ]
    return Study(
        name="sensitivity",
        title="Sensitivity to LeMix's weights",
        about=ABOUT_SENSITIVITY,
        cells=cells,
        run=run_cell,
        report=_sensitivity_report,
    )


def _sensitivity_report(rows: Sequence[Row]) -> Report:
    sections: list[Section] = []
    for rate in distinct(rows, "rate"):
        sections += sections_by(select(rows, rate=rate), "value", SHOWN, f", {rate} requests/s")
    return Report(
        sections=sections,
        verdicts=[all_applied(points(rows))],
        charts={"by-value": chart_by(rows, "value", SHOWN, "rate")},
    )
