"""Forecasts of a simulated cluster, whose stages tell of their ops at most 20 times a second."""

import asyncio
from collections import Counter

import pytest

from lemix.simulation.cluster import SimulationOptions, simulated_cluster
from lemix.simulation.drive import drive
from lemix.simulation.loop import run_virtual
from lemix.simulation.record import RunRecord
from lemix.simulation.run import drive_options, planned
from lemix.simulation.workload import WorkloadOptions
from shared.bus.base import Incoming
from shared.messages.events import StageProgress
from shared.subjects import PROGRESS, PROGRESS_EVERY_S

Told = Counter[tuple[int, int]]
"""Reports by (node, stage)."""


async def run(options: SimulationOptions, workload: WorkloadOptions) -> tuple[RunRecord, Told]:
    told: Told = Counter()

    async def on_progress(incoming: Incoming[StageProgress]) -> None:
        told[incoming.message.node, incoming.message.stage] += 1

    async with simulated_cluster(options) as world:
        await world.bus.subscribe(PROGRESS.at(), on_progress)
        record = await drive(world, planned(workload, options.seed), drive_options(options))
        await asyncio.sleep(0)
    return record, told


@pytest.mark.parametrize(
    ("profile", "training_rate"), [("gpt2-large@rtx6000ada", 0.9), ("llama2-7b@a100", 0.5)]
)
def test_response_times_are_foreseen_within_five_percent(profile: str, training_rate: float) -> None:
    """Ops take 2 to 50 ms here: a stage does up to a dozen between two reports."""
    options = SimulationOptions(nodes=4, profile=profile, policy="lemix", seed=1)
    workload = WorkloadOptions(num_tasks=80, training_rate=training_rate, rate_per_s=16.0)
    record, told = run_virtual(run(options, workload))
    assert record.response_error is not None and record.response_error < 0.05
    assert max(told.values()) <= 1 + (record.ended_s + 1) / PROGRESS_EVERY_S


@pytest.mark.parametrize("profile", ["gpt2-large@rtx6000ada", "llama2-7b@a100"])
def test_stages_on_one_device_are_foreseen_to_take_turns(profile: str) -> None:
    options = SimulationOptions(
        nodes=4, profile=profile, policy="lemix", seed=1, stage_settings={"stages_held": 2}
    )
    workload = WorkloadOptions(num_tasks=80, training_rate=0.5, rate_per_s=16.0)
    record, _ = run_virtual(run(options, workload))
    assert record.response_error is not None and record.response_error < 0.05


@pytest.mark.parametrize("training_rate", [0.0, 0.5])
def test_response_times_beside_decoding_are_foreseen_within_five_percent(training_rate: float) -> None:
    """Prompts join the next iteration of decodes, or wait for one; their forecasts were 8 to 16 % off."""
    options = SimulationOptions(nodes=2, profile="llama2-7b@a100", policy="lemix", seed=1)
    workload = WorkloadOptions(num_tasks=60, training_rate=training_rate, rate_per_s=8.0, max_tokens=(16, 48))
    record, _ = run_virtual(run(options, workload))
    assert record.response_error is not None and record.response_error < 0.05
