"""Eight concurrent streams through one node of two stages, against `generate()` at batch 8, same cores."""

import asyncio
import time
from pathlib import Path
from typing import Any

from benchmarks.models import SHAPES, model_folder
from benchmarks.peer_process import running_peer
from benchmarks.report import spread
from benchmarks.workload import BATCH_SIZE, MAX_TOKENS, prompt_tokens
from lemix.client import ApiClient, Completion, served_model
from lemix.launcher import LocalCluster
from lemix.topology import ClusterOptions

NUM_ROUNDS = {"small": 9, "big": 5}


async def stream_all(client: ApiClient, prompts: list[list[int]]) -> dict[str, float]:
    """Tokens per second over HTTP with server-sent events, as a client sees them."""
    start_s = time.monotonic()
    completions: list[Completion] = await asyncio.gather(
        *(client.complete(prompt, max_tokens=MAX_TOKENS, temperature=0) for prompt in prompts)
    )
    whole_s = time.monotonic() - start_s
    first_s = max(completion.ttft_s for completion in completions)
    return {
        "decode_tokens_per_s": BATCH_SIZE * (MAX_TOKENS - 1) / (whole_s - first_s),
        "tokens_per_s": BATCH_SIZE * MAX_TOKENS / whole_s,
        "ttft_max_s": first_s,
    }


async def measure(name: str, work: Path) -> dict[str, Any]:
    """Alternate rounds of both sides; medians, ranges and the ratio of medians."""
    folder = model_folder(name, work / "models")
    prompts = prompt_tokens(SHAPES[name]["vocab_size"])
    options = ClusterOptions(name="bench", runs_dir=work, nodes=1, stages=2, model=str(folder))
    ours, theirs = [], []
    async with (
        LocalCluster(options) as cluster,
        running_peer("generate", folder) as peer,
        ApiClient(cluster.api_url, model=await served_model(cluster.api_url)) as client,
    ):
        await stream_all(client, prompts)
        for _ in range(NUM_ROUNDS[name]):
            ours.append(await stream_all(client, prompts))
            theirs.append(await peer.measure())
    return {
        kind: {
            "lemix": spread([one[kind] for one in ours]),
            "generate": spread([one[kind] for one in theirs]),
            "ratio_of_medians": spread([one[kind] for one in ours])["median"]
            / spread([one[kind] for one in theirs])["median"],
        }
        for kind in ("decode_tokens_per_s", "tokens_per_s")
    } | {"ttft_max_s": spread([one["ttft_max_s"] for one in ours])}


async def main(work: Path) -> dict[str, Any]:
    return {name: await measure(name, work) for name in SHAPES}
