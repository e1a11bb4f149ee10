"""The cost of pacing training: messages for each batch, and how long a device stands still around a step.

A node of emulated stages, as `lemix up` starts them, with a real bus; training alone.
Messages are all that NATS carries but heartbeats and what the scheduler is told of ops.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import nats
from nats.aio.msg import Msg

from benchmarks.report import spread
from lemix.open_cluster import open_cluster
from lemix.run_folder import clear
from lemix.topology import ClusterOptions
from lemix.waiting import AppliedBatches, wait_nodes_ready
from shared import subjects
from shared.bus.base import Incoming
from shared.bus.nats import NatsBus
from shared.messages.events import StageProgress

CASES = ((1, "1f1b"), (2, "1f1b"), (2, "async"))
"""Stages, schedule."""
PROFILE = "gpt2-large@rtx6000ada"
NUM_MICROBATCHES = 4
NUM_BATCHES = 24
TOKENS = 128
"""In each microbatch."""
LEFT_OUT = ("heartbeat", "progress")
"""Last words of subjects."""


async def main(work: Path) -> dict[str, Any]:
    return {f"{schedule}, S = {stages}": await _measure(work, stages, schedule) for stages, schedule in CASES}


async def _measure(work: Path, stages: int, schedule: str) -> dict[str, Any]:
    options = ClusterOptions(
        name=f"pacing-{stages}-{schedule}",
        runs_dir=work,
        nodes=1,
        stages=stages,
        emulate=PROFILE,
        extra_env={
            "LEMIX_SCHEDULE": schedule,
            "LEMIX_MICROBATCHES": str(NUM_MICROBATCHES),
            "LEMIX_CHECKPOINT_EVERY": "1000",
            "LEMIX_CHECKPOINT_IDLE_S": "1000",
        },
    )
    clear(options.run_dir)
    async with open_cluster(options) as cluster:
        bus = await NatsBus.connect(cluster.nats_url, name="bench")
        applied = await AppliedBatches.following(bus)
        await wait_nodes_ready(bus, 1)
        await _train(bus, applied, 0)
        messages, still_s = await _count(cluster.nats_url), await _stand_still(bus)
        await _train(bus, applied, NUM_BATCHES)
        counted = {subject: count / NUM_BATCHES for subject, count in sorted(messages.items())}
        await bus.close()
    return {
        "messages_per_batch": sum(counted.values()),
        "by_subject": counted,
        "still_around_a_step_s": spread(still_s),
    }


async def _train(bus: NatsBus, applied: AppliedBatches, first: int) -> None:
    ids = [f"bench-{number}" for number in range(first, first + NUM_BATCHES)]
    for batch_id in ids:
        examples = [{"token_ids": list(range(TOKENS))}] * NUM_MICROBATCHES
        await bus.publish_durable(
            subjects.BATCHES, json.dumps({"id": batch_id, "examples": examples}).encode()
        )
    await applied.wait_for(ids)


async def _count(nats_url: str) -> Counter[str]:
    """Count the messages that NATS carries from now on, by the last words of subjects."""
    messages: Counter[str] = Counter()

    async def note(message: Msg) -> None:
        last = message.subject.rpartition(".")[2]
        if message.subject.startswith("lemix.") and last not in LEFT_OUT:
            messages[last] += 1

    connection = await nats.connect(nats_url)
    await connection.subscribe("lemix.>", cb=note)
    await connection.flush()
    return messages


async def _stand_still(bus: NatsBus) -> list[float]:
    """For each step of stage 0 from now on: seconds without work between the ops before and after it."""
    still_s: list[float] = []

    async def on_progress(incoming: Incoming[StageProgress]) -> None:
        if incoming.message.stage == 0:
            still_s.extend(_gaps_s(incoming.message))

    await bus.subscribe(subjects.PROGRESS.at(), on_progress)
    await asyncio.sleep(0)
    return still_s


def _gaps_s(progress: StageProgress) -> Iterator[float]:
    """The gaps around steps between two other ops of the same report, whose times are exact."""
    spans = [(each.op.kind, -each.ago_s - each.elapsed_s, -each.ago_s) for each in progress.ended]
    for (before, step), (_, after) in pairwise(pairwise(spans)):
        if step[0] == "step":
            yield step[1] - before[2] + after[1] - step[2]
