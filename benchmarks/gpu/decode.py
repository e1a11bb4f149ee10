"""Decoding by a node of one stage and by one of two, against the card's bandwidth and `generate()`."""

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.decode import BusStreams
from benchmarks.gpu.bounds import read_bytes_per_s
from benchmarks.gpu.node import MODEL, large_node, model
from benchmarks.models import DTYPES, SHAPES
from benchmarks.peer_process import running_peer
from benchmarks.workload import prompt_tokens
from shared.bus.nats import NatsBus

NUM_ROUNDS = 4
STREAMS = (1, 8)


async def main(work: Path, device: str) -> dict[str, Any]:
    """Steps a second; a step reads all weights once, so bandwidth over their bytes is the bound."""
    bandwidth = read_bytes_per_s(device)
    folder = model(work, device)
    weights_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    bound = bandwidth / weights_bytes
    async with running_peer("generate", folder, device, DTYPES[MODEL]) as peer:
        rates = [(await peer.measure())["decode_tokens_per_s"] for _ in range(NUM_ROUNDS)]
    generated = median(rates)
    result: dict[str, Any] = {
        "read_bytes_per_s": bandwidth,
        "weights_bytes": weights_bytes,
        "bound_steps_per_s": bound,
        "generate_8_tokens_per_s": generated,
    }
    for stages in (1, 2):
        result[f"stages_{stages}"] = await _of_node(work, device, stages, bound)
    result["two_stages_to_one"] = {
        key: result["stages_2"][key]["tokens_per_s"] / result["stages_1"][key]["tokens_per_s"]
        for key in result["stages_1"]
    }
    result["node_to_generate_at_8"] = result["stages_1"]["8_streams"]["tokens_per_s"] / generated
    return result


async def _of_node(work: Path, device: str, stages: int, bound: float) -> dict[str, Any]:
    prompts = prompt_tokens(SHAPES[MODEL]["vocab_size"])
    result = {}
    async with large_node(f"decode-{stages}", work, device, {}, stages=stages) as cluster:
        bus = await NatsBus.connect(cluster.nats_url, name="bench")
        streams = BusStreams(bus)
        await streams.start()
        await streams.run(prompts)
        for count in STREAMS:
            rounds = [await streams.run(prompts[:count]) for _ in range(NUM_ROUNDS)]
            rate = median(one["decode_tokens_per_s"] for one in rounds)
            result[f"{count}_streams"] = {"tokens_per_s": rate, "share_of_bandwidth": rate / count / bound}
        await bus.close()
    return result
