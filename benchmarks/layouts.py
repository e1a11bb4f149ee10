"""The stages of a node in one worker process, against one process each: decoding, and training, in turns.

Both clusters stand at the same time; the one whose turn it is not is idle.
"""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.decode import BusStreams
from benchmarks.models import SHAPES, model_folder
from benchmarks.report import spread
from benchmarks.training import train_round
from benchmarks.workload import LEARNING_RATE, prompt_tokens
from lemix.devices import num_cpu_cores
from lemix.open_cluster import open_cluster
from lemix.run_folder import clear
from lemix.topology import ClusterOptions, layout_of
from lemix.waiting import AppliedBatches, wait_nodes_ready
from shared.bus.nats import NatsBus

MODEL, NUM_STAGES = "small", 2
NUMBERS_OF_NODES = (1, 2)
LAYOUTS = {"one_worker_a_node": NUM_STAGES, "one_worker_a_stage": 1}
"""Stages in each worker."""
NUM_ROUNDS, BATCHES_PER_ROUND = 5, 4
ROUND_LIMIT_S = 120.0
"""A request that fails, as where a stage was silent for seconds, ends the measurement."""
SETTINGS = {
    "LEMIX_MICROBATCHES": "4",
    "LEMIX_LEARNING_RATE": str(LEARNING_RATE),
    "LEMIX_CHECKPOINT_EVERY": "1000",
    "LEMIX_CHECKPOINT_IDLE_S": "1000",
    "LEMIX_GUARD_SAMPLES": "0",
}


@dataclass
class Side:
    """A running cluster of one layout."""

    bus: NatsBus
    streams: BusStreams
    applied: AppliedBatches
    num_batches: int = 0

    @classmethod
    async def start(cls, options: ClusterOptions, stack: AsyncExitStack) -> Self:
        """Ends with `stack`."""
        clear(options.run_dir)
        cluster = await stack.enter_async_context(open_cluster(options))
        bus = await NatsBus.connect(cluster.nats_url, name="bench")
        stack.push_async_callback(bus.close)
        side = cls(bus, BusStreams(bus), await AppliedBatches.following(bus))
        await side.streams.start()
        await wait_nodes_ready(bus, options.nodes)
        return side

    async def round(self, number: int) -> dict[str, float]:
        """Tokens a second of eight streams, then of training."""
        vocab_size = SHAPES[MODEL]["vocab_size"]
        streamed = await self.streams.run(prompt_tokens(vocab_size, number))
        trained = await train_round(self.bus, self.applied, self.num_batches, BATCHES_PER_ROUND, vocab_size)
        self.num_batches += BATCHES_PER_ROUND
        return {
            "decode_tokens_per_s": streamed["decode_tokens_per_s"],
            "serving_tokens_per_s": streamed["tokens_per_s"],
            "training_tokens_per_s": trained,
        }


async def measure(nodes: int, work: Path) -> dict[str, Any]:
    folder = model_folder(MODEL, work / "models")
    async with AsyncExitStack() as stack:
        sides, threads = {}, {}
        for name, held in LAYOUTS.items():
            options = ClusterOptions(
                name=f"layout-{held}-of-{nodes}",
                runs_dir=work,
                nodes=nodes,
                stages=NUM_STAGES,
                stages_per_worker=held,
                model=str(folder),
                extra_env=SETTINGS,
            )
            sides[name] = await Side.start(options, stack)
            threads[name] = layout_of(options, num_cpu_cores()).num_threads
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(NUM_ROUNDS + 1):  # the first one warms up
            for name in list(sides)[:: 1 if number % 2 else -1]:
                async with asyncio.timeout(ROUND_LIMIT_S):
                    measured = await sides[name].round(number)
                if number > 0:
                    rounds[name].append(measured)
    return {"compute_threads_of_a_worker": threads, **compared(rounds)}


def compared(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Spreads of both, and of the ratios of rounds that followed each other."""
    one, other = rounds.values()
    ratios = {kind: spread([a[kind] / b[kind] for a, b in zip(one, other, strict=True)]) for kind in one[0]}
    spreads = {
        name: {kind: spread([each[kind] for each in measured]) for kind in measured[0]}
        for name, measured in rounds.items()
    }
    return {**spreads, "one_worker_a_node_to_one_a_stage": ratios}


async def main(work: Path) -> dict[str, Any]:
    return {f"nodes_{nodes}": await measure(nodes, work) for nodes in NUMBERS_OF_NODES}
