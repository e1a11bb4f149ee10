"""Prompts through a node of one stage, against the card's rate of matrix products."""

import random
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.decode import BusStreams
from benchmarks.gpu.bounds import matrix_flops_per_s
from benchmarks.gpu.node import MODEL, large_node, model
from benchmarks.models import SHAPES, num_weights
from shared.bus.nats import NatsBus

NUM_ROUNDS = 5
NUM_PROMPTS = 8
PROMPT_LENGTH = 1024


async def main(work: Path, device: str) -> dict[str, Any]:
    """Two operations for each weight and token; attention, which is little here, is not counted."""
    flops_per_s = matrix_flops_per_s(device)
    folder = model(work, device)
    settings = {"LEMIX_MAX_ITERATION_TOKENS": "4096", "LEMIX_KV_TOKENS": str(4 * NUM_PROMPTS * PROMPT_LENGTH)}
    times_s = []
    async with large_node("prefill", work, device, settings) as cluster:
        bus = await NatsBus.connect(cluster.nats_url, name="bench")
        streams = BusStreams(bus, max_tokens=1)
        await streams.start()
        for number in range(NUM_ROUNDS + 1):
            start_s = time.monotonic()
            await streams.run(_prompts(number))
            times_s.append(time.monotonic() - start_s)
        await bus.close()
    tokens_per_s = NUM_PROMPTS * PROMPT_LENGTH / median(times_s[1:])
    share = 2 * num_weights(folder) * tokens_per_s / flops_per_s
    return {"tokens_per_s": tokens_per_s, "matrix_flops_per_s": flops_per_s, "share_of_matrix_rate": share}


def _prompts(number: int) -> list[list[int]]:
    """Other tokens in each round, so that no cache knows them."""
    chance = random.Random(number)
    vocab_size = SHAPES[MODEL]["vocab_size"]
    return [[chance.randrange(vocab_size) for _ in range(PROMPT_LENGTH)] for _ in range(NUM_PROMPTS)]
