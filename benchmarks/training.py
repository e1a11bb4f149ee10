"""Training tokens per second through one node, against a plain PyTorch loop, same device.

On a CPU two stages, on a GPU one: stages that share a GPU take turns on it.
"""

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.models import DTYPES, SHAPES, model_folder, models_for
from benchmarks.peer_process import running_peer
from benchmarks.report import spread
from benchmarks.workload import EXAMPLE_LENGTH, LEARNING_RATE, NUM_EXAMPLES, example_tokens
from lemix.open_cluster import open_cluster
from lemix.run_folder import clear
from lemix.topology import ClusterOptions
from lemix.waiting import AppliedBatches, wait_nodes_ready
from shared import subjects
from shared.bus.nats import NatsBus

BATCHES_PER_ROUND = {"cpu": {"small": 10, "big": 2}, "cuda": {"big": 30, "huge": 20, "large": 20}}
NUM_ROUNDS = {"cpu": {"small": 5, "big": 2}, "cuda": {"big": 3, "huge": 3, "large": 3}}
NUM_STAGES = {"cpu": 2, "cuda": 1}
NUM_MICROBATCHES = {"cpu": 4, "cuda": 1}
TRAINING_SETTINGS = {
    "LEMIX_LEARNING_RATE": str(LEARNING_RATE),
    "LEMIX_CHECKPOINT_EVERY": "1000",
    "LEMIX_CHECKPOINT_IDLE_S": "1000",
    "LEMIX_GUARD_SAMPLES": "0",
    "LEMIX_KV_TOKENS": "16384",
}
"""Nothing but steps; and a fixed cache, for a GPU has to have room for the other side, too."""


async def train_round(
    bus: NatsBus, applied: AppliedBatches, first: int, count: int, vocab_size: int
) -> float:
    """Publish `count` batches and wait until they are in the weights; tokens per second."""
    start_s = time.monotonic()
    ids = [f"bench-{number}" for number in range(first, first + count)]
    for number, batch_id in enumerate(ids, start=first):
        examples = [{"token_ids": tokens} for tokens in example_tokens(vocab_size, number)]
        batch = {"id": batch_id, "examples": examples}
        await bus.publish_durable(subjects.BATCHES, json.dumps(batch).encode())
    await applied.wait_for(ids)
    return count * NUM_EXAMPLES * EXAMPLE_LENGTH / (time.monotonic() - start_s)


async def measure(name: str, work: Path, device: str) -> dict[str, Any]:
    """Alternate rounds of both sides."""
    folder = model_folder(name, work / "models", device)
    vocab_size, kind = SHAPES[name]["vocab_size"], device.partition(":")[0]
    count = BATCHES_PER_ROUND[kind][name]
    settings = {
        **TRAINING_SETTINGS,
        "LEMIX_DTYPE": DTYPES[name],
        "LEMIX_MICROBATCHES": str(NUM_MICROBATCHES[kind]),
    }
    options = ClusterOptions(
        name=f"training-{name}",
        runs_dir=work,
        nodes=1,
        stages=NUM_STAGES[kind],
        devices=(device,),
        model=str(folder),
        extra_env=settings,
    )
    clear(options.run_dir)
    ours, theirs = [], []
    async with open_cluster(options) as cluster, running_peer("train", folder, device, DTYPES[name]) as peer:
        bus = await NatsBus.connect(cluster.nats_url, name="bench")
        applied = await AppliedBatches.following(bus)
        await wait_nodes_ready(bus, 1)
        done = 0
        for round_number in range(NUM_ROUNDS[kind][name] + 1):
            rate = await train_round(bus, applied, done, count, vocab_size)
            done += count
            if round_number > 0:
                ours.append(rate)
                theirs.append((await peer.measure())["tokens_per_s"])
        await bus.close()
    ratio = spread(ours)["median"] / spread(theirs)["median"]
    return {"lemix": spread(ours), "plain_loop": spread(theirs), "ratio_of_medians": ratio}


async def main(work: Path, device: str = "cpu") -> dict[str, Any]:
    return {name: await measure(name, work, device) for name in models_for(device)}
