"""How far the scheduler's forecasts are off in simulation, and how often stages tell of their ops.

The response error compares when a first token came with the forecast at its placement (docs/metrics.md).
Recorded requests are replayed, too, where the benchmark's folder has `traces/code.csv` or `conversation.csv`,
on devices that keep the profile's times, and on devices that do not.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lemix.simulation.cluster import SimulationOptions, simulated_cluster
from lemix.simulation.drive import drive
from lemix.simulation.loop import run_virtual
from lemix.simulation.record import RunRecord
from lemix.simulation.run import drive_options, planned
from lemix.simulation.trace import TraceRow, read_trace
from lemix.simulation.workload import WorkloadOptions
from shared.bus.base import Incoming
from shared.messages.events import StageProgress
from shared.profiles.profile import profile_named
from shared.schedule import ScheduleName
from shared.subjects import PROGRESS

SEEDS = (0, 1, 2)
TRACE_SEEDS = (0,)
"""One of these runs takes most of a minute."""
NUM_TASKS = 200
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
TRACES = {"code": 4.0, "conversation": 6.0}
"""Requests per second to which a trace is stretched."""
TRACED_PROFILE = "llama2-13b@a100"
SKIPPED_ROWS = 4000
"""Forecasts were worked on with earlier ones."""
DEVICES = ((0.0, 0.0), (0.05, 0.0), (0.0, 0.05), (0.05, 0.05))
"""(noise, bias) of devices: see `lemix.simulation.device_noise`."""


async def main(work: Path) -> dict[str, Any]:
    """Measure in a thread, because this thread's event loop is a real one."""
    return await asyncio.to_thread(lambda: {"cases": _drawn(), "traces": _traced(work / "traces")})


def _drawn() -> list[dict[str, Any]]:
    return [
        {"profile": profile, "schedule": schedule}
        | _measure(
            {"profile": profile, "schedule": schedule},
            WorkloadOptions(
                num_tasks=NUM_TASKS,
                training_rate=training_rate,
                rate_per_s=rate_per_s,
                max_tokens=(max_tokens, max_tokens),
            ),
            SEEDS,
        )
        for profile, schedule, rate_per_s, training_rate, max_tokens in CASES
    ]


def _traced(folder: Path) -> list[dict[str, Any]]:
    return [
        {"trace": name, "device_noise": noise, "device_bias": bias}
        | _measure(
            {"profile": TRACED_PROFILE, "device_noise": noise, "device_bias": bias},
            WorkloadOptions(
                num_tasks=NUM_TASKS,
                training_rate=training_rate,
                rate_per_s=rate_per_s,
                trace=_rows(folder / f"{name}.csv"),
                max_length=profile_named(TRACED_PROFILE, None).context_length,
            ),
            TRACE_SEEDS,
        )
        for name, rate_per_s in TRACES.items()
        if (folder / f"{name}.csv").exists()
        for training_rate in (0.0, 0.5)
        for noise, bias in DEVICES
    ]


def _rows(path: Path) -> tuple[TraceRow, ...]:
    rows = read_trace(path, limit=SKIPPED_ROWS + NUM_TASKS)[SKIPPED_ROWS:]
    return tuple(row._replace(at_s=row.at_s - rows[0].at_s) for row in rows)


def _measure(cluster: dict[str, Any], workload: WorkloadOptions, seeds: Sequence[int]) -> dict[str, Any]:
    runs = [
        run_virtual(_run(SimulationOptions(nodes=4, policy="lemix", seed=seed, **cluster), workload))
        for seed in seeds
    ]
    return {
        "seeds": list(seeds),
        "requests_per_s": workload.rate_per_s,
        "training_rate": workload.training_rate,
        "max_tokens": "as recorded" if workload.trace else workload.max_tokens[1],
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
