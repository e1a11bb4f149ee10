"""LeMix without each of its parts where devices are busy: at the loads of the frontier."""

from collections.abc import Sequence
from dataclasses import replace

from lemix.studies.demand import SEEDS
from lemix.studies.frontier_loads import FULL, QUICK, FrontierLoad
from lemix.studies.grid import Cell, Report, Study
from lemix.studies.measures import (
    SLO_ATTAINMENT,
    TASKS_PER_NODE_S,
    TBT_P99,
    TRAINING_KEPT,
    TRAINING_WHILE_SERVING,
)
from lemix.studies.rows import POLICY, Row, points
from lemix.studies.runs import run_cell
from lemix.studies.setting import Contender
from lemix.studies.tables import sections_by
from lemix.studies.verdicts import all_applied

CONTENDERS = (
    Contender("lemix"),
    Contender("no_prior_profile", "lemix:without=profile"),
    Contender("no_prioritization", "lemix", "fifo"),
    Contender("no_idleness", "lemix:without=idleness"),
    Contender("no_exposure", "lemix:exposure=0"),
    Contender("no_consistency", "lemix:without=consistency"),
    Contender("no_consolidation", "lemix:without=consolidation"),
    Contender("no_deferral", "lemix:without=deferral"),
    Contender("paper's score", "lemix:score=paper"),
    Contender("least_loaded"),
)
NODES: Sequence[int] = (3, 4, 3, 4, 2, 4, 2)
"""For each load of the frontier: as few as are nearly enough, so that devices are busy."""
MEASURES = (SLO_ATTAINMENT, TBT_P99, TRAINING_KEPT, TRAINING_WHILE_SERVING, TASKS_PER_NODE_S)
ABOUT = """\
The loads of the study `frontier`, each on as few nodes as are nearly enough for it, without one part of LeMix
at a time. no_prior_profile learns its costs from what runs, no_prioritization serves stages in order of
arrival. Memory is no part here: it is not short. Devices have noise and a table of their own."""


def busy_parts(*, quick: bool) -> Study:
    few = [replace(load, num_requests=30) for load in QUICK.loads]
    loads = list(zip(few if quick else FULL.loads, NODES, strict=False))
    return Study(
        name="busy-parts",
        title="Ablation where devices are busy",
        about=ABOUT,
        cells=[
            cell
            for load, nodes in loads
            for contender in CONTENDERS[: 2 if quick else None]
            for cell in _runs(load, contender, nodes, SEEDS[: 1 if quick else None])
        ],
        run=run_cell,
        report=_report,
    )


def _runs(load: FrontierLoad, contender: Contender, nodes: int, seeds: Sequence[int]) -> list[Cell]:
    demand = load.demand()
    demand = replace(demand, cluster={**demand.cluster, "discipline": contender.discipline})
    labels = {**load.labels, POLICY: contender.label}
    return demand.runs(contender.policy or contender.label, nodes, seeds, labels)


def _report(rows: Sequence[Row]) -> Report:
    return Report(sections=sections_by(rows, "load", MEASURES), verdicts=[all_applied(points(rows))])
