"""A node on the card, with `large` loaded, and what it is measured by."""

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.decode import BusStreams
from benchmarks.models import DTYPES, SHAPES, model_folder
from benchmarks.training import NUM_MICROBATCHES, TRAINING_SETTINGS
from benchmarks.workload import prompt_tokens
from lemix.open_cluster import open_cluster
from lemix.run_folder import clear
from lemix.topology import ClusterOptions
from lemix.waiting import wait_nodes_ready
from shared.bus.base import Incoming
from shared.bus.nats import NatsBus
from shared.messages.events import StageProgress
from shared.subjects import PROGRESS

MODEL = "large"
NUM_ROUNDS = 5


def model(work: Path, device: str) -> Path:
    """Its folder, made at first use."""
    return model_folder(MODEL, work / "models", device)


class OpTimes:
    """The times that stages tell of their ops."""

    def __init__(self) -> None:
        self._times_s: dict[str, list[float]] = defaultdict(list)

    async def on_progress(self, incoming: Incoming[StageProgress]) -> None:
        progress = incoming.message
        for ended in progress.ended:
            what = f"stage {progress.stage}: {ended.op.kind} of {ended.op.num_tokens} tokens"
            self._times_s[what].append(ended.elapsed_s)

    def take(self) -> dict[str, dict[str, float]]:
        """How many there were since the last call, and their median in ms, by kind and size."""
        taken = {
            what: {"count": len(times_s), "median_ms": 1e3 * median(times_s)}
            for what, times_s in self._times_s.items()
        }
        self._times_s.clear()
        return taken


@dataclass(frozen=True, slots=True)
class NodeUnderTest:
    """A node that is ready and warm."""

    bus: NatsBus
    streams: BusStreams
    op_times: OpTimes

    async def decode(self, count: int, *, bound_steps_per_s: float | None = None) -> dict[str, Any]:
        """So many streams; a step's time by the clock, and by what the stages tell of it."""
        prompts = prompt_tokens(SHAPES[MODEL]["vocab_size"])[:count]
        self.op_times.take()
        rounds = [(await self.streams.run(prompts))["decode_tokens_per_s"] for _ in range(NUM_ROUNDS)]
        rate = median(rounds)
        result = {"tokens_per_s": rate, "step_ms": 1e3 * count / rate, "op_ms": self.op_times.take()}
        if bound_steps_per_s is not None:
            result["share_of_bandwidth"] = rate / count / bound_steps_per_s
        return result


@asynccontextmanager
async def node_under_test(
    name: str, work: Path, device: str, *, stages: int = 1
) -> AsyncIterator[NodeUnderTest]:
    """Ended on exit."""
    options = ClusterOptions(
        name=name,
        runs_dir=work,
        nodes=1,
        stages=stages,
        devices=(device,),
        model=str(model(work, device)),
        extra_env={
            **TRAINING_SETTINGS,
            "LEMIX_DTYPE": DTYPES[MODEL],
            "LEMIX_MICROBATCHES": str(NUM_MICROBATCHES["cuda"]),
            "LEMIX_MAX_ITERATION_TOKENS": "4096",
        },
    )
    clear(options.run_dir)
    async with open_cluster(options) as cluster:
        bus = await NatsBus.connect(cluster.nats_url, name="bench")
        await wait_nodes_ready(bus, 1)
        node = NodeUnderTest(bus, BusStreams(bus), OpTimes())
        await bus.subscribe(PROGRESS.at(), node.op_times.on_progress)
        await node.streams.start()
        await node.streams.run(prompt_tokens(SHAPES[MODEL]["vocab_size"]))
        yield node
        await bus.close()
