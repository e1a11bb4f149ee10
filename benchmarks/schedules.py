"""Pipeline schedules on one emulated node of four stages, beside what the textbook says of them.

Stages are equal and of constant speed, a backward takes twice its forward, and nothing is served. In virtual
time: the numbers depend on no machine. Idle shares are of the time between the first whole batch's start and
the last one's end, steps counted as work.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from lemix.simulation.cluster import SimulationOptions, running_cluster
from lemix.simulation.devices import Devices
from lemix.simulation.drive import DriveOptions, drive
from lemix.simulation.loop import run_virtual
from lemix.simulation.record import DIGITS, Op, RunRecord
from lemix.simulation.workload import PlannedBatch, Workload
from shared.profiles.times import Work
from shared.schedule import ScheduleName

STAGES = 4
TOKENS = 512
"""Tokens in a microbatch."""
FORWARD_S, BACKWARD_S, STEP_S = 0.02, 0.04, 0.02
"""About those of a quarter of a 7B model on one big GPU."""
HOP_S = 0.0005
SCHEDULES: tuple[ScheduleName, ...] = ("async", "1f1b", "gpipe")
MICROBATCHES = (4, 16)
NUM_BATCHES = 24
MEASURED = slice(6, 18)
"""Batches away from the warm-up and the end."""


@dataclass(frozen=True, slots=True)
class EqualTimes:
    """A stage that takes as long for every microbatch."""

    def iteration_s(self, work: Work) -> float:
        return FORWARD_S

    def forward_s(self, work: Work) -> float:
        return FORWARD_S

    def backward_s(self, work: Work) -> float:
        return BACKWARD_S

    def step_s(self) -> float:
        return STEP_S


async def main(work: Path) -> dict[str, Any]:
    """Measure in a thread, because this thread's event loop is a real one."""
    return await asyncio.to_thread(_measure_all)


def _measure_all() -> dict[str, Any]:
    rows = [measure(schedule, count) for count in MICROBATCHES for schedule in SCHEDULES]
    found = {(row["schedule"], row["microbatches"]): row for row in rows}
    few, many = MICROBATCHES
    return {
        "stages": STAGES,
        "forward_s": FORWARD_S,
        "backward_s": BACKWARD_S,
        "step_s": STEP_S,
        "hop_s": HOP_S,
        "rows": rows,
        "async_to_gpipe": found["async", few]["tokens_per_s"] / found["gpipe", few]["tokens_per_s"],
        "async_to_bound": found["async", many]["tokens_per_s"] / bound_tokens_per_s(many),
        "peak_1f1b_to_gpipe": {
            count: found["1f1b", count]["peak_microbatches"] / found["gpipe", count]["peak_microbatches"]
            for count in MICROBATCHES
        },
    }


def bound_tokens_per_s(microbatches: int) -> float:
    """No stage is ever idle."""
    batch_s = microbatches * (FORWARD_S + BACKWARD_S) + STEP_S
    return microbatches * TOKENS / batch_s


def textbook_idle_share(schedule: ScheduleName, microbatches: int) -> float:
    """GPipe (arXiv 1811.06965) and 1F1B (arXiv 1806.03377): (S - 1) / (M + S - 1); without a flush, none."""
    return 0.0 if schedule == "async" else (STAGES - 1) / (microbatches + STAGES - 1)


def measure(schedule: ScheduleName, microbatches: int) -> dict[str, Any]:
    """One run of equal batches, one after the other."""
    record = run_virtual(_run(schedule, microbatches))
    start_s, end_s = _measured_span_s(record)
    tokens = (MEASURED.stop - MEASURED.start) * microbatches * TOKENS
    idle = [1 - _busy_s(record.ops, stage, start_s, end_s) / (end_s - start_s) for stage in range(STAGES)]
    return {
        "schedule": schedule,
        "microbatches": microbatches,
        "tokens_per_s": tokens / (end_s - start_s),
        "idle_share": sum(idle) / STAGES,
        "idle_share_by_stage": idle,
        "textbook_idle_share": textbook_idle_share(schedule, microbatches),
        "peak_microbatches": max(peak_microbatches(record.ops, stage) for stage in range(STAGES)),
    }


async def _run(schedule: ScheduleName, microbatches: int) -> RunRecord:
    options = SimulationOptions(
        nodes=1,
        stages=STAGES,
        profile="equal",
        policy="round_robin",
        schedule=schedule,
        hop_s=HOP_S,
        trainer_settings={"microbatches": microbatches},
    )
    devices = Devices(
        times=(EqualTimes(),) * STAGES, vocab_size=32000, context_length=4096, kv_tokens=1 << 18
    )
    batches = tuple(PlannedBatch((TOKENS,) * microbatches) for _ in range(NUM_BATCHES))
    async with running_cluster(options, devices=devices) as cluster:
        workload = Workload(requests=(), batches=batches, release="all")
        return await drive(
            cluster.world, workload, DriveOptions(schedule=schedule, microbatches=microbatches)
        )


def _measured_span_s(record: RunRecord) -> tuple[float, float]:
    """Start and end of the measured batches: from the end of the batch before the first to the last end."""
    ends_s = sorted(batch.applied_s for batch in record.batches if batch.applied_s is not None)
    return ends_s[MEASURED.start - 1], ends_s[MEASURED.stop - 1]


def _busy_s(ops: Iterable[Op], stage: int, start_s: float, end_s: float) -> float:
    return sum(max(0.0, min(op.end_s, end_s) - max(op.start_s, start_s)) for op in ops if op.stage == stage)


def peak_microbatches(ops: Iterable[Op], stage: int) -> int:
    """Microbatches whose activations the stage holds at once: from the forward's start to the backward's end.

    A last stage that goes backward at once tells of one op, and holds one. Times are rounded: a forward may
    start in the very instant in which a backward ends.
    """
    own = [op for op in ops if op.stage == stage and op.kind in ("forward", "backward")]
    if all(op.kind == "forward" for op in own):
        return 1
    changes = [
        (round(op.start_s, DIGITS), 1) if op.kind == "forward" else (round(op.end_s, DIGITS), -1)
        for op in own
    ]
    return max(accumulate(change for _, change in sorted(changes)))
