"""Decoding beside training that never pauses, on the CPU: the time between tokens, and what slices cost.

Clients of a node ask again at once, first alone and then while the node trains all the time. And in one
process a microbatch goes through a stage whole and in slices, in turns.
"""

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks.models import SHAPES, model_folder
from benchmarks.report import spread
from benchmarks.training import TRAINING_SETTINGS
from benchmarks.workload import BATCH_SIZE, MAX_TOKENS, example_tokens, prompt_tokens
from lemix.client import ApiClient, Completion, served_model
from lemix.launcher import LocalCluster
from lemix.run_folder import clear
from lemix.topology import ClusterOptions
from lemix.waiting import AppliedBatches, wait_nodes_ready
from services.stage_worker.compute.torch_executor import TorchExecutor
from services.stage_worker.settings import StageWorkerSettings
from shared import subjects
from shared.bus.nats import NatsBus
from shared.messages.training import Microbatch, StepOrder

MODEL = "small"
NUMBERS_OF_STAGES = (1, 2)
ROUND_S = 12.0
NUM_MICROBATCHES = 4
BATCHES_AHEAD = 3
"""The node never waits for one."""
NUM_PAIRS = 30
"""Microbatches of each kind, after one that warms up."""


class Training:
    """Feeds a node batches for as long as it is told."""

    def __init__(self, bus: NatsBus, applied: AppliedBatches) -> None:
        self._bus = bus
        self._applied = applied
        self.num_applied = 0

    async def run(self) -> None:
        """Until cancelled."""
        waiting: list[str] = []
        for number in itertools.count():
            if len(waiting) == BATCHES_AHEAD:
                await self._applied.wait_for([waiting.pop(0)])
                self.num_applied += 1
            examples = [
                {"token_ids": tokens} for tokens in example_tokens(SHAPES[MODEL]["vocab_size"], number)
            ]
            waiting.append(f"bench-{number}")
            body = {"id": waiting[-1], "examples": examples}
            await self._bus.publish_durable(subjects.BATCHES, json.dumps(body).encode())


async def ask_for(api: ApiClient, duration_s: float, prompts: Iterator[list[int]]) -> list[Completion]:
    """Completions of clients that ask again at once, all that began in that time."""
    until_s = time.monotonic() + duration_s

    async def client() -> list[Completion]:
        done = []
        while time.monotonic() < until_s:
            done.append(await api.complete(next(prompts), max_tokens=MAX_TOKENS, temperature=0))
        return done

    return list(itertools.chain(*await asyncio.gather(*(client() for _ in range(BATCH_SIZE)))))


def between_tokens(completions: Sequence[Completion], elapsed_s: float) -> dict[str, float]:
    tbt_s = [each for completion in completions for each in completion.tbt_s]
    median_s, p99_s = statistics.median(tbt_s), statistics.quantiles(tbt_s, n=100)[98]
    return {
        "tokens_per_s": sum(completion.completion_tokens for completion in completions) / elapsed_s,
        "times_between_tokens": len(tbt_s),
        "tbt_p50_s": median_s,
        "tbt_p99_s": p99_s,
        "tbt_max_s": max(tbt_s),
        "p99_in_medians": p99_s / median_s,
    }


async def measure(stages: int, work: Path) -> dict[str, Any]:
    """Alone, then beside training."""
    folder = model_folder(MODEL, work / "models")
    options = ClusterOptions(
        name=f"giving-way-{stages}",
        runs_dir=work,
        nodes=1,
        stages=stages,
        model=str(folder),
        extra_env=TRAINING_SETTINGS | {"LEMIX_MICROBATCHES": str(NUM_MICROBATCHES)},
    )
    clear(options.run_dir)
    prompts = itertools.chain.from_iterable(
        prompt_tokens(SHAPES[MODEL]["vocab_size"], number) for number in itertools.count()
    )
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(LocalCluster(options))
        api = ApiClient(cluster.api_url, model=await served_model(cluster.api_url))
        await stack.enter_async_context(api)
        bus = await NatsBus.connect(cluster.nats_url, name="bench")
        stack.push_async_callback(bus.close)
        await wait_nodes_ready(bus, 1)
        await ask_for(api, 1.0, prompts)
        began_s = time.monotonic()
        alone = between_tokens(await ask_for(api, ROUND_S, prompts), time.monotonic() - began_s)
        training = Training(bus, await AppliedBatches.following(bus))
        feeding = asyncio.create_task(training.run())
        await ask_for(api, 1.0, prompts)
        before, began_s = training.num_applied, time.monotonic()
        completions = await ask_for(api, ROUND_S, prompts)
        elapsed_s = time.monotonic() - began_s
        beside = between_tokens(completions, elapsed_s)
        beside["batches_per_s"] = (training.num_applied - before) / elapsed_s
        feeding.cancel()
    return {"alone": alone, "beside_training": beside}


async def cost(work: Path) -> dict[str, Any]:
    """A forward and backward of one microbatch on one thread, whole and in slices."""
    folder = model_folder(MODEL, work / "models")
    executors = {}
    for name, discipline in (("whole", "fifo"), ("in_slices", "slo_first")):
        settings = StageWorkerSettings(
            node=0,
            stage=0,
            num_stages=1,
            model=str(folder),
            run_dir=work,
            shm_dir=work,
            discipline=discipline,
            num_threads=1,
        )
        executors[name] = TorchExecutor(settings, name)
    num_slices = {name: (await executor.load()).num_slices for name, executor in executors.items()}
    took_s: dict[str, list[float]] = {name: [] for name in executors}
    for number in range(NUM_PAIRS + 1):
        for name in list(executors)[:: 1 if number % 2 else -1]:
            took_s[name].append(await _train_once(executors[name], number))
    for executor in executors.values():
        await executor.close()
    counted = {name: each[1:] for name, each in took_s.items()}
    ratios = [sliced / whole for whole, sliced in zip(*counted.values(), strict=True)]
    return {
        "num_slices": num_slices,
        **{f"{name}_s": spread(each) for name, each in counted.items()},
        "in_slices_to_whole": spread(ratios),
    }


async def _train_once(executor: TorchExecutor, number: int) -> float:
    examples = example_tokens(SHAPES[MODEL]["vocab_size"], number)[: BATCH_SIZE // NUM_MICROBATCHES]
    lengths = tuple(map(len, examples))
    tokens = tuple(itertools.chain(*examples))
    microbatch = Microbatch(
        fence=1,
        batch_id="b",
        index=0,
        count=1,
        lengths=lengths,
        label_rows=tuple(range(len(tokens) - 1)),
        labels=tokens[1:],
        loss_weight=1 / len(tokens),
    )
    began_s = time.perf_counter()
    await executor.forward(microbatch, tokens)
    elapsed_s = time.perf_counter() - began_s
    await executor.finish_batch("b")
    await executor.step(StepOrder(fence=1, batch_id="b", version=0, learning_rate=0.0, skip=True))
    return elapsed_s


async def main(work: Path) -> dict[str, Any]:
    return {
        "cost_of_slices": await cost(work),
        **{f"1x{stages}": await measure(stages, work) for stages in NUMBERS_OF_STAGES},
    }
