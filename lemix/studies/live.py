"""One column of the main grid on the real cluster: real services over NATS, on emulated devices.

Each run is made twice from the same options: on a cluster of this machine, and simulated with the hop that
was measured there meanwhile. What differs is what the simulation leaves out: the services' own time, and the
machine's.
"""

import asyncio
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from lemix.bus import open_bus
from lemix.launcher import LocalCluster
from lemix.simulation.cluster import MAX_MICROBATCH_TOKENS, NEVER, SimulationOptions
from lemix.simulation.drive import drive
from lemix.simulation.metrics import metrics_of
from lemix.simulation.record import RunRecord
from lemix.simulation.run import drive_options, planned, simulate, slo_s
from lemix.simulation.workload import WorkloadOptions
from lemix.status import fetch_status
from lemix.steps import wait_nodes_ready
from lemix.studies import paper
from lemix.studies.charts import chart_by
from lemix.studies.grid import Cell, Report, Section, Study
from lemix.studies.measures import IDLE_SHARE, RESPONSE, SLO_ATTAINMENT, TTFT, Measure, number, percent
from lemix.studies.rows import POLICY, Metrics, Row
from lemix.studies.runs import as_numbers
from lemix.studies.setting import CLASSES, Contender, Load, cell
from lemix.studies.tables import pivot
from lemix.studies.verdicts import Finding, Verdict
from lemix.topology import ClusterOptions
from shared.clock import IdSource, SystemClock
from shared.lifecycle import World
from shared.profiles.profile import profile_named
from shared.telemetry import NoTelemetry

NODES = 2
TRAINING_RATE = 0.5
NUM_TASKS = 120
QUICK_TASKS = 20
SEEDS = range(1)
CONTENDERS = (Contender("lemix"), Contender("round_robin"), Contender("separate:split=0.5"))
PROBE_EVERY_S = 0.02
SIMULATED = "simulated_"
"""Before the names of the simulation's metrics."""
DIFFERENCE = "difference_"
"""Before the names of relative differences, the simulation's to the cluster's."""
COMPARED = (RESPONSE, SLO_ATTAINMENT)
MOST = 0.10
ABOUT = f"""\
llama2-13b@a100 on {NODES} nodes of two stages (not four: all processes share this machine's cores),
training rate {TRAINING_RATE}, {NUM_TASKS} tasks, {len(SEEDS)} seed: the real services as processes of this
machine over NATS, on stages that hold their device for as long as the profile says; and the same workload
from the same seed in the simulation. The simulation's hop is half of the median round trip of a status
request to the cluster while it works. This study alone depends on the machine, and on what else it does."""


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
            cluster={"nodes": NODES},
        )
        for rate in (paper.RATES[-1:] if quick else paper.RATES)
        for contender in (CONTENDERS[:1] if quick else CONTENDERS)
        for seed in (SEEDS[:1] if quick else SEEDS)
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
    """On the cluster, then simulated. Raises ClusterFailedError when the cluster does not start or ends."""
    record, hop_s = asyncio.run(run_cluster(cell.cluster, cell.workload))
    real = as_numbers(metrics_of(record, slo_s=slo_s(cell.cluster)), cell.workload)
    _, metrics = simulate(replace(cell.cluster, hop_s=hop_s), cell.workload)
    simulated = as_numbers(metrics, cell.workload)
    return {
        **real,
        **{SIMULATED + name: value for name, value in simulated.items()},
        **{DIFFERENCE + each.metric: difference(real, simulated, each) for each in COMPARED},
        "hop_s": hop_s,
    }


def difference(real: Metrics, simulated: Metrics, measure: Measure) -> float | None:
    """Of the simulation to the cluster, as a share of the cluster's; None where either is not known."""
    measured, predicted = real[measure.metric], simulated[measure.metric]
    return None if not measured or predicted is None else predicted / measured - 1


async def run_cluster(options: SimulationOptions, workload: WorkloadOptions) -> tuple[RunRecord, float]:
    """What happened on a cluster of this machine, and the seconds that a message took there."""
    clock = SystemClock()
    with TemporaryDirectory(prefix="lemix-live-") as folder:
        chosen = cluster_options(options, Path(folder))
        async with LocalCluster(chosen) as cluster, open_bus(cluster.nats_url) as bus:
            await wait_nodes_ready(bus, options.nodes)
            ids = IdSource(random.Random(options.seed))
            world = World(bus=bus, clock=clock, ids=ids, telemetry=NoTelemetry())
            async with asyncio.TaskGroup() as group:
                probe = HopProbe(world)
                probing = group.create_task(probe.run())
                record = await drive(world, planned(workload, options.seed), drive_options(options))
                probing.cancel()
            return record, probe.hop_s


def cluster_options(options: SimulationOptions, folder: Path) -> ClusterOptions:
    """The real cluster that is configured as the simulated one."""
    profile = profile_named(options.profile, options.stages)
    return ClusterOptions(
        name="live",
        runs_dir=folder,
        nodes=options.nodes,
        stages=profile.num_stages,
        emulate=options.profile,
        policy=options.policy,
        extra_env={
            "LEMIX_COSTS": options.costs,
            "LEMIX_DISCIPLINE": options.discipline,
            "LEMIX_SCHEDULE": options.schedule,
            "LEMIX_SLO_FACTOR": str(options.slo_factor),
            "LEMIX_MAX_MICROBATCH_TOKENS": str(MAX_MICROBATCH_TOKENS),
            "LEMIX_CHECKPOINT_EVERY": str(NEVER),
            "LEMIX_CHECKPOINT_IDLE_S": str(NEVER),
            "LEMIX_MAX_PENDING": str(NEVER),
            **{f"LEMIX_{name.upper()}": str(value) for name, value in options.stage_settings.items()},
            **{f"LEMIX_{name.upper()}": str(value) for name, value in options.trainer_settings.items()},
        },
    )


class HopProbe:
    """How long a message takes while the cluster works: half of a status request's round trip, which is two
    messages and little work between them.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._round_trips_s: list[float] = []

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            began_s = self._world.clock.now_s()
            await fetch_status(self._world.bus)
            self._round_trips_s.append(self._world.clock.now_s() - began_s)
            await asyncio.sleep(PROBE_EVERY_S)

    @property
    def hop_s(self) -> float:
        """The median."""
        return statistics.median(self._round_trips_s) / 2


def report(rows: Sequence[Row]) -> Report:
    shown = (*COMPARED, TTFT, IDLE_SHARE)
    both = side_by_side(rows)
    return Report(
        sections=[
            *(Section(title=f"{each.title} by rate", body=pivot(both, each, "rate")) for each in shown),
            *(
                Section(
                    title=f"Difference of the simulation, {each.title.partition(' (')[0]} (%)",
                    body=pivot(rows, Measure(DIFFERENCE + each.metric, each.title, percent), "rate"),
                )
                for each in COMPARED
            ),
            Section(title="A message's way (s)", body=pivot(rows, Measure("hop_s", "hop", number), "rate")),
        ],
        verdicts=[within(rows, each) for each in COMPARED],
        charts={"by-rate": chart_by(both, "rate", shown)},
    )


def side_by_side(rows: Sequence[Row]) -> list[Row]:
    """Two rows of each: what the cluster did, and what the simulation did, under policies of their own."""
    found = []
    for row in rows:
        simulated = {
            name.removeprefix(SIMULATED): spread
            for name, spread in row.metrics.items()
            if name.startswith(SIMULATED)
        }
        found += [
            Row(row.labels, row.metrics, row.num_runs),
            Row({**row.labels, POLICY: f"{row.labels[POLICY]} (simulated)"}, simulated, row.num_runs),
        ]
    return found


def within(rows: Sequence[Row], measure: Measure) -> Verdict:
    """The median over the seeds of the relative difference, at every setting."""
    findings = [
        Finding(row.labels, abs(value), MOST, abs(value) <= MOST, "", DIFFERENCE + measure.metric)
        for row in rows
        if (value := row.median(DIFFERENCE + measure.metric)) is not None
    ]
    title = measure.title.partition(" (")[0]
    return Verdict(f"{title} of the simulation within {MOST:.0%} of the cluster's", tuple(findings))
