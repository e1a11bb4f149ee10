"""Eight concurrent streams through one node, against `generate()` at batch 8, same device.

On a CPU with one stage and with two, on a GPU with one: stages that share a GPU take turns on it. On a CPU
LEMIX_BENCH_CHAT_MODEL adds the model of that folder.
"""

import asyncio
import itertools
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.models import DTYPES, endless_folder, model_folder, models_for, vocab_size
from benchmarks.peer_process import running_peer
from benchmarks.report import spread
from benchmarks.workload import MAX_TOKENS, prompt_tokens
from lemix.client import ApiClient, served_model
from lemix.open_cluster import open_cluster
from lemix.run_folder import clear
from lemix.topology import ClusterOptions
from shared import subjects
from shared.bus.base import Incoming
from shared.bus.nats import NatsBus
from shared.messages.inference import InferenceTask, Sampling, TokensProduced

NUM_ROUNDS = {"small": 15, "big": 5, "huge": 3}
CHAT_MODEL = "LEMIX_BENCH_CHAT_MODEL"
KINDS = ("decode_tokens_per_s", "tokens_per_s")
REQUEST_TIMEOUT_S = 300.0


def rates(num_streams: int, start_s: float, first_s: float, last_s: float) -> dict[str, float]:
    """`first_s`: when the last stream had its first token; `last_s`: when all had all."""
    return {
        "decode_tokens_per_s": num_streams * (MAX_TOKENS - 1) / (last_s - first_s),
        "tokens_per_s": num_streams * MAX_TOKENS / (last_s - start_s),
        "ttft_max_s": first_s - start_s,
    }


async def stream_over_http(client: ApiClient, prompts: list[list[int]]) -> dict[str, float]:
    """Server-sent events, as a client sees them."""
    start_s = time.monotonic()
    completions = await asyncio.gather(
        *(client.complete(prompt, max_tokens=MAX_TOKENS, temperature=0) for prompt in prompts)
    )
    assert all(completion.completion_tokens == MAX_TOKENS for completion in completions)
    first_s = start_s + max(one.ttft_s for one in completions)
    return rates(len(prompts), start_s, first_s, time.monotonic())


GATEWAY = "gateway.bench"


class BusStreams:
    """Streams as a gateway sees them: tokens on the bus, from the node itself."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus
        self._num_tokens: dict[str, int] = {}
        self._all_begun, self._all_done = asyncio.Event(), asyncio.Event()
        self._ids = itertools.count()

    async def start(self) -> None:
        await self._bus.subscribe(subjects.TOKENS.at(gateway=GATEWAY), self._on_tokens)

    async def run(self, prompts: list[list[int]]) -> dict[str, float]:
        """Raises TimeoutError when one of them fails."""
        self._num_tokens = {f"bench-{next(self._ids)}": 0 for _ in prompts}
        self._all_begun.clear()
        self._all_done.clear()
        start_s = time.monotonic()
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await asyncio.gather(*(self._submit(*one) for one in zip(self._num_tokens, prompts, strict=True)))
            await self._all_begun.wait()
            first_s = time.monotonic()
            await self._all_done.wait()
        return rates(len(prompts), start_s, first_s, time.monotonic())

    async def _submit(self, task_id: str, prompt: list[int]) -> None:
        sampling = Sampling(max_tokens=MAX_TOKENS, temperature=0.0)
        task = InferenceTask(
            task_id=task_id,
            gateway=GATEWAY,
            prompt=tuple(prompt),
            sampling=sampling,
            timeout_s=REQUEST_TIMEOUT_S,
        )
        await self._bus.request(subjects.SUBMIT.at(), task, timeout_s=10.0)

    async def _on_tokens(self, incoming: Incoming[TokensProduced]) -> None:
        for result in incoming.message.results:
            self._num_tokens[result.task_id] += result.token is not None
        if min(self._num_tokens.values()) >= 1:
            self._all_begun.set()
        if min(self._num_tokens.values()) == MAX_TOKENS:
            self._all_done.set()


async def measure(
    folder: Path, work: Path, device: str, stages: int, *, dtype: str, num_rounds: int
) -> dict[str, Any]:
    """Alternate rounds of both sides; medians, ranges and ratios of medians."""
    prompts = (prompt_tokens(vocab_size(folder), number) for number in itertools.count(1))
    options = ClusterOptions(
        name=f"decode-{folder.name}-1x{stages}",
        runs_dir=work,
        nodes=1,
        stages=stages,
        devices=(device,),
        model=str(folder),
        extra_env={"LEMIX_DTYPE": dtype},
    )
    clear(options.run_dir)
    rounds: dict[str, list[dict[str, float]]] = {"node": [], "http": [], "generate": []}
    async with (
        open_cluster(options) as cluster,
        running_peer("generate", folder, device, dtype) as peer,
        ApiClient(cluster.api_url, model=await served_model(cluster.api_url)) as client,
    ):
        bus = await NatsBus.connect(cluster.nats_url, name="bench")
        streams = BusStreams(bus)
        await streams.start()
        await stream_over_http(client, next(prompts))
        for _ in range(num_rounds):
            rounds["node"].append(await streams.run(next(prompts)))
            rounds["generate"].append(await peer.measure())
            rounds["http"].append(await stream_over_http(client, next(prompts)))
        await bus.close()
    return summary(rounds)


def summary(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    spreads = {
        side: {kind: spread([one[kind] for one in measured]) for kind in measured[0]}
        for side, measured in rounds.items()
    }
    ratios = {
        f"{side}_to_generate": {
            kind: spreads[side][kind]["median"] / spreads["generate"][kind]["median"] for kind in KINDS
        }
        for side in ("node", "http")
    }
    return spreads | {"ratio_of_medians": ratios}


async def main(work: Path, device: str = "cpu") -> dict[str, Any]:
    """Measure each model with each number of stages."""
    folders = {name: model_folder(name, work / "models") for name in models_for(device)}
    if device == "cpu" and CHAT_MODEL in os.environ:
        folders["chat"] = endless_folder(Path(os.environ[CHAT_MODEL]), work / "models")
    return {
        f"{name} 1x{stages}": await measure(
            folder,
            work,
            device,
            stages,
            dtype=DTYPES.get(name, "float32"),
            num_rounds=NUM_ROUNDS.get(name, NUM_ROUNDS["big"]),
        )
        for name, folder in folders.items()
        for stages in ((1, 2) if device == "cpu" else (1,))
    }
