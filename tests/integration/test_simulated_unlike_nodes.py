"""Policies on nodes that are not alike: one of four is three times slower than anybody was told."""

from statistics import fmean

from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.metrics import RunMetrics
from lemix.simulation.node_events import NodeEvent
from lemix.simulation.run import simulate
from lemix.simulation.workload import WorkloadOptions

SEEDS = range(3)
SLOW = NodeEvent(at_s=0, kind="slow", node=1, factor=3.0)


def runs_of(policy: str) -> list[RunMetrics]:
    workload = WorkloadOptions(
        num_tasks=400,
        training_rate=0.025,
        rate_per_s=60.0,
        batch_size=8,
        release="poisson",
        training_per_s=1.5,
    )
    return [
        simulate(
            SimulationOptions(
                nodes=4, stages=2, profile="llama2-13b@a100", policy=policy, seed=seed, events=(SLOW,)
            ),
            workload,
        )[1]
        for seed in SEEDS
    ]


def test_lemix_keeps_the_objective_at_least_as_often_as_the_node_with_the_fewest_tasks() -> None:
    lemix, least_loaded = runs_of("lemix"), runs_of("least_loaded")
    assert fmean(run.slo_attainment for run in lemix) >= fmean(run.slo_attainment for run in least_loaded)
    assert all(run.batches_applied_share == 1 for run in lemix)
    assert fmean(run.response_error for run in lemix) < 0.1
