"""How far the scheduler's forecasts are off in simulation, and how often stages tell of their ops.

The response error compares when a first token came with the forecast at its placement (docs/metrics.md).
"""

import asyncio
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from lemix.simulation.cluster import SimulationOptions, simulated_cluster
from lemix.simulation.drive import drive
from lemix.simulation.loop import run_virtual
from lemix.simulation.record import RunRecord
from lemix.simulation.run import drive_options, planned
from lemix.simulation.workload import WorkloadOptions
from shared.bus.base import Incoming
from shared.messages.events import StageProgress
from shared.schedule import ScheduleName
from shared.subjects import PROGRESS

SEEDS = (0, 1, 2)
CASES: tuple[tuple[str, ScheduleName, float, float, int], ...] = (
    ("gpt2-small@rtx6000ada", "async", 16.0, 0.5, 1),
    ("gpt2-large@rtx6000ada", "async", 16.0, 0.5, 1),
    ("gpt2-large@rtx6000ada", "async", 16.0, 0.9, 1),
    ("gpt2-large@rtx6000ada", "1f1b", 16.0, 0.9, 1),
    ("llama2-7b@a100", "async", 16.0, 0.5, 1),
    ("llama2-7b@a100", "async", 16.0, 0.9, 1),
    ("gpt2-large@rtx6000ada", "async", 8.0, 0.5, 32),
    ("llama2-7b@a100", "async", 8.0, 0.5, 32),
)
"""Profile, schedule, requests per second, share of training, tokens of each answer."""


async def main(work: Path) -> dict[str, Any]:
    """Measure in a thread, because this thread's event loop is a real one."""
    return await asyncio.to_thread(lambda: {"cases": [_measure(*case) for case in CASES]})


def _measure(
    profile: str, schedule: ScheduleName, rate_per_s: float, training_rate: float, max_tokens: int
) -> dict[str, Any]:
    runs = []
    for seed in SEEDS:
        options = SimulationOptions(nodes=4, profile=profile, policy="lemix", schedule=schedule, seed=seed)
        workload = WorkloadOptions(
            num_tasks=200,
            training_rate=training_rate,
            rate_per_s=rate_per_s,
            max_tokens=(max_tokens, max_tokens),
        )
        runs.append(run_virtual(_run(options, workload)))
    return {
        "profile": profile,
        "schedule": schedule,
        "requests_per_s": rate_per_s,
        "training_rate": training_rate,
        "max_tokens": max_tokens,
        "response_error": fmean(record.response_error or 0.0 for record, _ in runs),
        "forward_error": fmean(record.forward_error or 0.0 for record, _ in runs),
        "most_reports_per_s_and_stage": max(most_per_s for _, most_per_s in runs),
    }


async def _run(options: SimulationOptions, workload: WorkloadOptions) -> tuple[RunRecord, float]:
    told: Counter[tuple[int, int]] = Counter()

    async def on_progress(incoming: Incoming[StageProgress]) -> None:
        told[incoming.message.node, incoming.message.stage] += 1

    async with simulated_cluster(options) as world:
        await world.bus.subscribe(PROGRESS.at(), on_progress)
        record = await drive(world, planned(workload, options.seed), drive_options(options))
    return record, max(told.values()) / record.ended_s
