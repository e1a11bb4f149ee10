"""One column of the main grid on the real cluster: real services over NATS, on emulated devices.

Each run is made three times from the same options: on a cluster of this machine; simulated with what services
added there to what devices took (see overheads.py); and simulated with the simulation's own hop alone.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

import uvloop

from lemix.simulation.cluster import HOP_S, SimulationOptions
from lemix.simulation.run import measured, simulate
from lemix.simulation.workload import WorkloadOptions
from lemix.studies import paper
from lemix.studies.charts import chart_by
from lemix.studies.grid import Cell, Report, Section, Study
from lemix.studies.measures import IDLE_SHARE, RESPONSE, SLO_ATTAINMENT, TTFT, Measure, percent
from lemix.studies.real_cluster import run_cluster
from lemix.studies.rows import POLICY, Metrics, Row, Spread
from lemix.studies.runs import as_numbers
from lemix.studies.setting import CLASSES, NODES, Contender, Load, cell, seeds
from lemix.studies.tables import pivot
from lemix.studies.verdicts import Finding, Verdict

TRAINING_RATE = 0.5
NUM_TASKS = 120
QUICK_TASKS = 20
CONTENDERS = (Contender("lemix"), Contender("round_robin"), Contender("separate:split=0.5"))
SIMULATED = "simulated_"
"""Before the names of the metrics of the simulation with measured overheads."""
FIXED = "fixed_hop_"
"""Before those of the simulation with its own hop, and no other overhead."""
WORLDS = {SIMULATED: "simulated", FIXED: "fixed hop"}
COMPARED = (RESPONSE, SLO_ATTAINMENT)
OVERHEADS = (
    Measure("hop_s", "hop (ms)", lambda value: f"{1000 * value:.2f}"),
    Measure("handover_s", "hand-over (ms)", lambda value: f"{1000 * value:.2f}"),
)
MOST = 0.10
ABOUT = f"""\
llama2-13b@a100 on {NODES} nodes of two stages, training rate {TRAINING_RATE}, {NUM_TASKS} tasks, five seeds.
The real services run over NATS as processes of one machine ({os.cpu_count()} cores; nice
{os.getpriority(os.PRIO_PROCESS, 0)}), on stages that hold their device for as long as the profile says.
The same workloads from the same seeds run in the simulation, twice:

- **simulated**: with the hop and the hand-over that were measured in that very run on the cluster. The hop
  is the mean time from the end of an iteration on one stage to its start on the next, if that stage is idle:
  a message, and the work of the services before and after it. The hand-over is the mean time from the end of
  an op on an idle device to the moment when its service knows. Both come from the stages' reports to the
  scheduler: nothing is fitted to response times.
- **fixed hop**: as in every other study, {1000 * HOP_S:g} ms a message and nothing else.

A difference compares the simulation's median over the seeds with the cluster's. The cluster's scheduler
assumes a hop of {1000 * HOP_S:g} ms in its forecasts, the simulated one the simulation's. Only this study
depends on the machine, and on its other work."""


def live(*, quick: bool) -> Study:
    model = CLASSES["llama2-13b"]
    cells = [
        cell(
            model,
            contender,
            Load(
                rate_per_s=rate,
                training_rate=TRAINING_RATE,
                num_tasks=QUICK_TASKS if quick else NUM_TASKS,
            ),
            seed=seed,
            labels={"class": model.name, "rate": rate},
        )
        for rate in (paper.RATES[-1:] if quick else paper.RATES)
        for contender in (CONTENDERS[:1] if quick else CONTENDERS)
        for seed in seeds(quick)
    ]
    return Study(
        name="live",
        title="The real cluster against its simulation",
        about=ABOUT,
        cells=cells,
        run=run_both,
        report=report,
        max_workers=1,
    )


def run_both(cell: Cell) -> Metrics:
    """On the cluster, then simulated with what was measured there, then with the simulation's own hop.

    Raises ClusterFailedError when the cluster does not start or ends, StudyFailedError when not all was
    served and trained in time.
    """
    record, overheads = uvloop.run(run_cluster(cell.cluster, cell.workload))
    real = as_numbers(measured(record, cell.cluster), cell.workload)
    alike = replace(cell.cluster, hop_s=overheads.hop_s, handover_s=overheads.handover_s)
    return {
        **real,
        **_simulated(alike, cell.workload, SIMULATED),
        **_simulated(cell.cluster, cell.workload, FIXED),
        **overheads._asdict(),
    }


def _simulated(options: SimulationOptions, workload: WorkloadOptions, prefix: str) -> Metrics:
    """The metrics of a simulated run, under names that begin with `prefix`."""
    _, metrics = simulate(options, workload)
    return {prefix + name: value for name, value in as_numbers(metrics, workload).items()}


def report(rows: Sequence[Row]) -> Report:
    shown = (*COMPARED, TTFT, IDLE_SHARE)
    return Report(
        sections=[
            *(
                Section(title=f"{each.title} by rate", body=pivot(side_by_side(rows, WORLDS), each, "rate"))
                for each in shown
            ),
            *(
                Section(title=f"Difference, {words}: {_name(each)} (%)", body=_differences(rows, each, world))
                for world, words in WORLDS.items()
                for each in COMPARED
            ),
            *(Section(title=f"{each.title} by rate", body=pivot(rows, each, "rate")) for each in OVERHEADS),
        ],
        verdicts=[within(rows, each, world) for world in WORLDS for each in COMPARED],
        charts={"by-rate": chart_by(side_by_side(rows, [SIMULATED]), "rate", shown)},
    )


def side_by_side(rows: Sequence[Row], worlds: Iterable[str]) -> list[Row]:
    """Rows for each: what the cluster did, and what simulations did, under policies of their own."""
    found = []
    for row in rows:
        found.append(row)
        for world in worlds:
            metrics = {
                name.removeprefix(world): spread
                for name, spread in row.metrics.items()
                if name.startswith(world)
            }
            found.append(
                Row({**row.labels, POLICY: f"{row.labels[POLICY]} ({WORLDS[world]})"}, metrics, row.num_runs)
            )
    return found


def difference(row: Row, measure: Measure, world: str) -> float | None:
    """Difference of a simulation's median to the cluster's, as a share of it; None: one is not known."""
    measured, predicted = row.median(measure.metric), row.median(world + measure.metric)
    return None if not measured or predicted is None else predicted / measured - 1


def _differences(rows: Sequence[Row], measure: Measure, world: str) -> str:
    found = [
        Row(row.labels, {measure.metric: Spread(value, value, value)}, row.num_runs)
        for row in rows
        if (value := difference(row, measure, world)) is not None
    ]
    return pivot(found, Measure(measure.metric, measure.title, percent), "rate")


def within(rows: Sequence[Row], measure: Measure, world: str) -> Verdict:
    """The difference at every setting."""
    findings = [
        Finding(row.labels, abs(value), MOST, abs(value) <= MOST, "", measure.metric)
        for row in rows
        if (value := difference(row, measure, world)) is not None
    ]
    words = f"{_name(measure)} within {MOST:.0%} of the cluster's"
    return Verdict(f"{words}, {WORLDS[world]}", tuple(findings))


def _name(measure: Measure) -> str:
    return measure.title.partition(" (")[0]
