"""Emulated devices have only so much memory: what policies make of it, and that training ends."""

import asyncio
from collections import defaultdict
from dataclasses import replace

import pytest

from lemix.simulation.cluster import SimulationOptions, devices_of, running_cluster
from lemix.simulation.devices import Devices
from lemix.simulation.drive import DriveOptions, drive
from lemix.simulation.loop import run_virtual
from lemix.simulation.record import RunRecord
from lemix.simulation.workload import PlannedBatch, Workload
from shared.bus.base import Incoming
from shared.messages.training import BatchStepped, StageReport, TrainingFailed
from shared.subjects import REPORT

NUM_BATCHES = 6
DEADLINE_S = 600.0


def with_room_for(num_tokens: int, devices: Devices) -> Devices:
    """The same devices, with so much room for activations on every stage."""
    profile = devices.profile
    assert profile is not None
    stages = []
    for stage in profile.stages:
        memory = stage.memory
        used = memory.weights_bytes + memory.training_bytes
        capacity = used + 2 * num_tokens * memory.activation_bytes_per_token
        stages.append(
            stage.model_copy(update={"memory": memory.model_copy(update={"capacity_bytes": capacity})})
        )
    return replace(devices, profile=profile.model_copy(update={"stages": tuple(stages)}))


def trained(policy: str, *, room_tokens: int) -> tuple[RunRecord, list[str]]:
    """Run batches of one microbatch of 400 tokens until the node's weights contain all.

    Returns the reasons of what failed, too.
    """
    options = SimulationOptions(nodes=1, profile="gpt2-small@rtx6000ada", policy=policy)
    batches = tuple(PlannedBatch((400,)) for _ in range(NUM_BATCHES))
    workload = Workload(requests=(), batches=batches, release="all")
    failures: list[str] = []
    is_done = asyncio.Event()
    stepped: defaultdict[int, set[str]] = defaultdict(set)
    """By fence, each of which begins anew: there are no checkpoints."""

    async def note(incoming: Incoming[StageReport]) -> None:
        report = incoming.message
        match report.event:
            case TrainingFailed(reason=reason):
                failures.append(reason)
            case BatchStepped(batch_id=batch_id):
                stepped[report.fence].add(batch_id)
                if len(stepped[report.fence]) == NUM_BATCHES:
                    is_done.set()

    async def main() -> RunRecord:
        devices = with_room_for(room_tokens, devices_of(options))
        async with running_cluster(options, devices=devices) as cluster:
            await cluster.world.bus.subscribe(REPORT.at(), note)
            record = await drive(cluster.world, workload, DriveOptions(schedule="async", microbatches=1))
            async with asyncio.timeout(DEADLINE_S):
                await is_done.wait()
            return record

    return run_virtual(main()), failures


def num_forwards(record: RunRecord) -> int:
    return sum(op.kind == "forward" for op in record.ops)


@pytest.mark.parametrize("room_tokens", [500, 300], ids=["for_one_batch", "for_none"])
def test_who_asks_for_room_meets_no_memory_error(room_tokens: int) -> None:
    blind, failures = trained("round_robin", room_tokens=room_tokens)
    assert failures
    assert all("do not fit" in reason for reason in failures)
    aware, no_failures = trained("lemix", room_tokens=room_tokens)
    assert no_failures == []
    assert num_forwards(aware) == 2 * NUM_BATCHES < num_forwards(blind), "each batch ran once on each stage"


def test_with_ample_room_nobody_fails() -> None:
    _, failures = trained("round_robin", room_tokens=10_000)
    assert failures == []
