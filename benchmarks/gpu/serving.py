"""One node of one stage: decoding, prompts, and decoding beside training, against the card's own bounds."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.bounds import matrix_flops_per_s, read_bytes_per_s
from benchmarks.gpu.node import MODEL, NodeUnderTest, model, node_under_test
from benchmarks.models import DTYPES, SHAPES, num_weights
from benchmarks.peer_process import running_peer
from benchmarks.training import train_round
from benchmarks.workload import prompt_tokens
from lemix.waiting import AppliedBatches

STREAMS = (1, 8)
NUM_ROUNDS = 5
NUM_PROMPTS, PROMPT_LENGTH = 8, 1024
NUM_BATCHES = 20
VOCAB_SIZE = SHAPES[MODEL]["vocab_size"]


async def main(work: Path, device: str) -> AsyncIterator[dict[str, Any]]:
    """Yields all that is known after each measurement.

    A decode step reads all weights once, so the bandwidth over their bytes is its bound. A prompt takes two
    operations for each weight and token: attention, which is little here, is not counted.
    """
    folder = model(work, device)
    weights_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    read, flops = read_bytes_per_s(device), matrix_flops_per_s(device)
    result: dict[str, Any] = {
        "read_bytes_per_s": read,
        "matrix_flops_per_s": flops,
        "weights_bytes": weights_bytes,
    }
    yield result
    async with node_under_test("serving", work, device) as node:
        for count in STREAMS:
            result[f"decode_{count}"] = await node.decode(count, bound_steps_per_s=read / weights_bytes)
            yield result
        tokens_per_s = await _prompt_tokens_per_s(node)
        share = 2 * num_weights(folder) * tokens_per_s / flops
        result["prefill"] = {"tokens_per_s": tokens_per_s, "share_of_matrix_rate": share}
        yield result
        result["beside_training"] = await _beside_training(node)
        yield result
    async with running_peer("generate", folder, device, DTYPES[MODEL]) as peer:
        rates = [(await peer.measure())["decode_tokens_per_s"] for _ in range(NUM_ROUNDS)]
    result["generate_8_tokens_per_s"] = max(rates)
    result["node_to_generate_at_8"] = result["decode_8"]["tokens_per_s"] / max(rates)
    yield result


async def _prompt_tokens_per_s(node: NodeUnderTest) -> float:
    """The best of some rounds; other tokens in each, so that no cache knows them."""
    times_s = []
    for number in range(NUM_ROUNDS + 1):
        some = prompt_tokens(VOCAB_SIZE, 1000 + number, length=PROMPT_LENGTH)
        times_s.append((await node.streams.run(some))["ttft_max_s"])
    return NUM_PROMPTS * PROMPT_LENGTH / min(times_s)


async def _beside_training(node: NodeUnderTest) -> dict[str, Any]:
    """Eight streams and training at the same time, and each alone."""
    applied, prompts = await AppliedBatches.following(node.bus), prompt_tokens(VOCAB_SIZE)

    async def train(first: int) -> float:
        return await train_round(node.bus, applied, first, NUM_BATCHES, VOCAB_SIZE)

    await train(0)  # memory is taken, kernels are chosen
    trained_alone = await train(NUM_BATCHES)
    node.op_times.take()
    training = asyncio.create_task(train(2 * NUM_BATCHES))
    rates: list[float] = []
    while not training.done():
        rates.append((await node.streams.run(prompts))["decode_tokens_per_s"])
    return {
        "training_alone_tokens_per_s": trained_alone,
        "training_tokens_per_s": await training,
        "decode_tokens_per_s": rates,
        "op_ms": node.op_times.take(),
    }
