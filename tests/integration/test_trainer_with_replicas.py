"""The trainer in front of two real nodes whose weights become one: the same on both, each batch once."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from services.trainer.service import Trainer
from services.trainer.settings import TrainerSettings
from services.trainer.streams import TRAIN_STREAM
from shared import checkpoints
from shared.bus.base import Incoming
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.checkpoints import Checkpoint
from shared.clock import SystemClock
from shared.messages.inference import Placed
from shared.messages.training import ShardSaved, TrainingTask
from shared.subjects import BATCHES, PLACE
from shared.telemetry import Telemetry
from tests.support.models import save_tiny_model
from tests.support.node import Node, running_node
from tests.support.plain_loop import State, assert_identical
from tests.support.training import ADAMW, LEARNING_RATE, random_batches
from tests.support.waiting import until

NUM_BATCHES = 6
BATCHES_OF_THE_RUN = random_batches(NUM_BATCHES, 2)
IDS = [f"b{number}" for number in range(NUM_BATCHES)]


@asynccontextmanager
async def two_nodes(num_stages: int, folder: Path, **settings: Any) -> AsyncIterator[list[Node]]:
    save_tiny_model("llama_tied", folder / "model")
    broker = MemoryBroker()
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                running_node(
                    folder / "model",
                    num_stages,
                    folder,
                    number=number,
                    broker=broker,
                    **{**ADAMW, **settings},
                )
            )
            for number in range(2)
        ]


@asynccontextmanager
async def running_trainer(bus: MemoryBus, folder: Path, **changes: Any) -> AsyncIterator[None]:
    settings = TrainerSettings(
        model=str(folder / "model"),
        run_dir=folder,
        microbatches=1,
        learning_rate=LEARNING_RATE,
        merge_every=2,
        checkpoint_every=2,
        checkpoint_idle_s=0.0,
        **changes,
    )
    trainer = Trainer(settings, bus=bus, clock=SystemClock(), telemetry=Telemetry("trainer", None))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(trainer.run())
        yield
        task.cancel()


async def place_in_turns(bus: MemoryBus) -> None:
    """Play the scheduler."""
    nodes = cycle(range(2))

    async def place(incoming: Incoming[TrainingTask]) -> Placed:
        return Placed(node=next(nodes))

    await bus.respond(PLACE.at(), place)


async def publish(bus: MemoryBus, start: int = 0, stop: int = NUM_BATCHES) -> None:
    for number in range(start, stop):
        examples = [{"token_ids": example} for part in BATCHES_OF_THE_RUN[number] for example in part]
        await bus.publish_durable(BATCHES, json.dumps({"id": IDS[number], "examples": examples}).encode())


def newest(folder: Path) -> Checkpoint | None:
    found = [latest for node in range(2) if (latest := checkpoints.latest(folder / "checkpoints", node))]
    return max(found, key=lambda checkpoint: checkpoint.manifest.version, default=None)


async def durable(folder: Path, version: int) -> Checkpoint:
    """The newest checkpoint, once it is that version."""
    await until(lambda: (found := newest(folder)) and found.manifest.version == version)
    found = newest(folder)
    assert found is not None
    return found


async def all_hold(nodes: list[Node], version: int) -> None:
    for node in nodes:
        await node.heard(
            lambda node=node: all(beat.weights_version == version for beat in node.heartbeats.values())
        )


def read(folder: Path) -> State:
    tensors: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


async def state_of(node: Node, version: int, folder: Path) -> State:
    """What its stages hold, which is of that version."""
    folder.mkdir()  # noqa: ASYNC240
    while node.reports.qsize():  # of the trainer's run
        node.reports.get_nowait()
    await node.save(version, folder, epoch=node.heartbeats[0].epoch)
    for _ in range(node.num_stages):
        report = await node.report()
        assert isinstance(report.event, ShardSaved), report
    return read(folder)


@pytest.mark.parametrize(
    ("num_stages", "settings"),
    [
        (1, {"schedule": "dp"}),
        (2, {"schedule": "1f1b", "merge": "allreduce"}),
        (2, {"schedule": "async", "merge": "average"}),
        (2, {"schedule": "1f1b", "merge": "outer"}),
    ],
)
async def test_two_nodes_end_with_the_same_weights_which_hold_each_batch_once(
    num_stages: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    async with two_nodes(num_stages, tmp_path, merge=settings.get("merge", "none")) as nodes:
        bus = nodes[0].bus
        await bus.ensure_stream(TRAIN_STREAM)
        await place_in_turns(bus)
        await publish(bus)
        async with running_trainer(bus, tmp_path, **settings):
            checkpoint = await durable(tmp_path, NUM_BATCHES)
            await all_hold(nodes, NUM_BATCHES)
        states = [
            await state_of(node, NUM_BATCHES, tmp_path / "checkpoints" / f"end-{node.number}")
            for node in nodes
        ]

    assert Counter(checkpoint.manifest.recent_batch_ids) == Counter(IDS)
    assert_identical(*states)
    assert_identical(states[0], read(checkpoint.folder))
