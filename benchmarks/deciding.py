"""How long the scheduler thinks about a task, in simulated clusters that have about a thousand in flight.

In CPU time: whoever else uses the machine is not in it.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.run import simulate
from lemix.simulation.workload import WorkloadOptions
from services.scheduler.policies.base import Arrival, Decision
from services.scheduler.policies.least_loaded import LeastLoaded
from services.scheduler.policies.lemix import Lemix
from services.scheduler.state import ClusterState

PROFILES = {8: "llama2-70b@a100", 4: "llama2-13b@a100"}
"""By stages."""
CLUSTERS = ((64, 8, 2000.0), (1000, 4, 20000.0))
"""(nodes, stages, requests per second: so many that about a thousand tasks are in flight)."""
POLICIES = (Lemix, LeastLoaded)
FULL = 0.8
"""Decisions count while at least this share of the most tasks ever is in flight."""


async def main(work: Path) -> dict[str, Any]:
    return await asyncio.to_thread(_measure_all)  # simulations have an event loop of their own


def _measure_all() -> dict[str, Any]:
    return {
        f"{kind.name}, {nodes} nodes x {stages} stages": measure(kind, nodes, stages, rate_per_s)
        for nodes, stages, rate_per_s in CLUSTERS
        for kind in POLICIES
    }


def measure(kind: type[Any], nodes: int, stages: int, rate_per_s: float) -> dict[str, Any]:
    """Percentiles in milliseconds, of `choose` alone."""
    options = SimulationOptions(nodes=nodes, stages=stages, profile=PROFILES[stages], policy=kind.name)
    workload = WorkloadOptions(num_tasks=4000, training_rate=0.2, rate_per_s=rate_per_s)
    with timing(kind) as decisions:
        simulate(options, workload)
    most = max(num_tasks for num_tasks, _ in decisions)
    full = [(num_tasks, seconds) for num_tasks, seconds in decisions if num_tasks >= FULL * most]
    milliseconds = [1e3 * seconds for _, seconds in full]
    return {
        "decisions": len(full),
        "tasks_in_flight": median(num_tasks for num_tasks, _ in full),
        "p50_ms": median(milliseconds),
        "p99_ms": quantiles(milliseconds, n=100)[98],
        "max_ms": max(milliseconds),
    }


@contextmanager
def timing(kind: type[Any]) -> Iterator[list[tuple[int, float]]]:
    """Every decision of policies of a kind: (tasks in flight, seconds)."""
    decisions: list[tuple[int, float]] = []
    choose = kind.choose

    def timed(self: Any, state: ClusterState, arrival: Arrival, now_s: float) -> Decision:
        begin_s = time.thread_time()
        decision: Decision = choose(self, state, arrival, now_s)
        seconds = time.thread_time() - begin_s
        decisions.append((sum(state.node(node).num_tasks for node in state.ready_nodes), seconds))
        return decision

    kind.choose = timed
    try:
        yield decisions
    finally:
        kind.choose = choose
