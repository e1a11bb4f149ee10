"""The trainer in front of two real nodes whose weights become one: the same on both, each batch once."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import cycle
from math import inf
from pathlib import Path
from typing import Any

import pytest

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
from tests.support.node import Node, running_node, running_nodes
from tests.support.plain import State, assert_identical
from tests.support.saving import tensors_in
from tests.support.training import ADAMW, BFLOAT16, LEARNING_RATE, LORA, random_batches, settings_id
from tests.support.waiting import until

PROMPT = [3, 14, 15, 92, 65, 35]
NUM_BATCHES = 6
BATCHES_OF_THE_RUN = random_batches(NUM_BATCHES, 2)
IDS = [f"b{number}" for number in range(NUM_BATCHES)]


@asynccontextmanager
async def running_trainer(bus: MemoryBus, folder: Path, **changes: Any) -> AsyncIterator[None]:
    settings = TrainerSettings(
        model=str(folder / "model"),
        run_dir=folder,
        microbatches=1,
        learning_rate=LEARNING_RATE,
        max_gradient_norm=inf,
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


async def place_in_turns(bus: MemoryBus, *, num_nodes: int) -> None:
    """Play the scheduler."""
    nodes = cycle(range(num_nodes))

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


async def state_of(node: Node, version: int, folder: Path) -> State:
    """What its stages hold, which is of that version."""
    folder.mkdir()  # noqa: ASYNC240
    while node.reports.qsize():  # of the trainer's run
        node.reports.get_nowait()
    await node.save(version, folder, fence=node.heartbeats[0].fence)
    await node.told(ShardSaved)
    return tensors_in(folder)


@pytest.mark.parametrize(
    ("num_stages", "settings", "of_stages"),
    [
        (1, {"schedule": "dp"}, {}),
        (2, {"schedule": "1f1b", "merge": "allreduce"}, {}),
        (2, {"schedule": "async", "merge": "average"}, {}),
        (2, {"schedule": "1f1b", "merge": "outer"}, {}),
        (2, {"schedule": "async", "merge": "average", "weights_consistency": "pinned"}, LORA),
        (2, {"schedule": "1f1b", "merge": "outer", "weights_consistency": "pinned"}, BFLOAT16),
    ],
    ids=settings_id,
)
async def test_two_nodes_end_with_the_same_weights_which_hold_each_batch_once(
    num_stages: int, settings: dict[str, Any], of_stages: dict[str, Any], tmp_path: Path
) -> None:
    model, merge = tmp_path / "model", settings.get("merge", "none")
    save_tiny_model("llama_tied", model)
    async with running_nodes(2, model, num_stages, tmp_path, merge=merge, **ADAMW, **of_stages) as nodes:
        bus = nodes[0].bus
        await bus.ensure_stream(TRAIN_STREAM)
        await place_in_turns(bus, num_nodes=2)
        await publish(bus)
        async with running_trainer(bus, tmp_path, **settings):
            checkpoint = await durable(tmp_path, NUM_BATCHES)
            await all_hold(nodes, NUM_BATCHES)
        states = [
            await state_of(node, NUM_BATCHES, tmp_path / "checkpoints" / f"end-{node.number}")
            for node in nodes
        ]

    assert checkpoint.manifest.adapter == of_stages.get("adapter", "")
    assert Counter(checkpoint.manifest.recent_batch_ids) == Counter(IDS)
    assert_identical(*states)
    assert_identical(states[0], tensors_in(checkpoint.folder))


@pytest.mark.parametrize("of_stages", [{}, LORA, BFLOAT16], ids=settings_id)
async def test_a_node_that_comes_later_answers_as_the_one_that_has_learnt(
    of_stages: dict[str, Any], tmp_path: Path
) -> None:
    model, broker, answers = tmp_path / "model", MemoryBroker(), []
    save_tiny_model("llama_tied", model)

    def node(number: int) -> AbstractAsyncContextManager[Node]:
        settings = {**ADAMW, **of_stages, "merge": "average"}
        return running_node(model, 2, tmp_path, number=number, broker=broker, **settings)

    async with node(0) as first:
        await first.bus.ensure_stream(TRAIN_STREAM)
        await place_in_turns(first.bus, num_nodes=1)
        before = await first.complete(PROMPT, max_tokens=8, num_logprobs=0)
        async with running_trainer(first.bus, tmp_path, schedule="1f1b", merge="average"):
            await publish(first.bus)
            await durable(tmp_path, NUM_BATCHES)
            async with node(1) as second:
                await all_hold([first, second], NUM_BATCHES)
                for each in (first, second):
                    answers.append(await each.complete(PROMPT, max_tokens=8, num_logprobs=0))
    logprobs = [[token.logprob for token in answer.tokens] for answer in (before, *answers)]
    assert logprobs[1] == pytest.approx(logprobs[2], abs=1e-5)
    assert logprobs[0] != pytest.approx(logprobs[1], abs=1e-3)
