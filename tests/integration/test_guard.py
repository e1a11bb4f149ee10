"""The trainer evaluates what it has trained on real stages, and has them serve only what is good enough."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.trainer.service import Trainer
from services.trainer.settings import TrainerSettings
from services.trainer.streams import TRAIN_STREAM
from shared import checkpoints
from shared.bus.base import Incoming
from shared.clock import SystemClock
from shared.errors import NoResponderError
from shared.messages.inference import Placed
from shared.messages.training import TrainingTask
from shared.messages.weights import NodeWeights, WeightsRequest
from shared.subjects import BATCHES, NODE_WEIGHTS, PLACE
from shared.telemetry import Telemetry
from tests.support.models import save_tiny_model
from tests.support.node import Node, running_node
from tests.support.training import Batch, loss_of, num_labels, random_batches
from tests.support.waiting import until

PROMPT = [3, 14, 15, 92, 65, 35]
HELD_OUT: Batch = random_batches(1, 3, seed=77)[0]


def examples_of(batch: Batch) -> list[dict[str, Any]]:
    return [{"token_ids": example} for microbatch in batch for example in microbatch]


@asynccontextmanager
async def guarded(node: Node, model: Path, run_dir: Path, **settings: Any) -> AsyncIterator[None]:
    """A trainer with a guard, for which this test plays the scheduler."""
    held_out = run_dir / "held_out.jsonl"
    held_out.write_text("\n".join(map(json.dumps, examples_of(HELD_OUT))))
    chosen = TrainerSettings(
        model=str(model),
        run_dir=run_dir,
        schedule="1f1b",
        microbatches=1,
        held_out=str(held_out),
        evaluate_every=2,
        checkpoint_every=2,
        checkpoint_idle_s=0.0,
        keep_checkpoints=100,
        **settings,
    )

    async def place(incoming: Incoming[TrainingTask]) -> Placed:
        return Placed(node=0)

    await node.bus.ensure_stream(TRAIN_STREAM)
    await node.bus.respond(PLACE.at(), place)
    trainer = Trainer(chosen, bus=node.bus, clock=SystemClock(), telemetry=Telemetry("trainer", None))
    task = asyncio.create_task(trainer.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()


async def publish(node: Node, batches: list[Batch], first: int = 0) -> None:
    for number, batch in enumerate(batches, start=first):
        body = json.dumps({"id": f"b{number}", "examples": examples_of(batch)}).encode()
        await node.bus.publish_durable(BATCHES, body)


async def weights_when(node: Node, condition: Callable[[NodeWeights], object]) -> NodeWeights:
    """What the trainer says of the node's weights, once it fulfils `condition`."""
    async with asyncio.timeout(60):
        while True:
            with suppress(NoResponderError):
                status = await node.bus.request(NODE_WEIGHTS.at(), WeightsRequest(), timeout_s=5.0)
                for found in status.nodes:
                    if condition(found):
                        return found
            await asyncio.sleep(0.02)


def loss_on_held_out(folder: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    examples = [example for microbatch in HELD_OUT for example in microbatch]
    with torch.no_grad():
        return loss_of(model, dict(model.named_parameters()), examples, num_labels(HELD_OUT)).item()


async def first_evaluated(node: Node) -> NodeWeights:
    return await weights_when(node, lambda found: found.held_out_loss is not None)


@pytest.mark.parametrize("num_stages", [1, 2])
async def test_a_good_version_is_served_and_its_loss_is_in_its_manifest(
    num_stages: int, tmp_path: Path
) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    run_dir.mkdir()
    save_tiny_model("llama_tied", model)
    async with (
        running_node(model, num_stages, run_dir) as node,
        guarded(node, model, run_dir, learning_rate=0.003, max_held_out_rise=0.5),
    ):
        first = await first_evaluated(node)
        assert first.held_out_loss == pytest.approx(loss_on_held_out(model), abs=1e-4)
        await publish(node, [HELD_OUT, HELD_OUT])
        found = await weights_when(node, lambda found: found.published == 2)
        answer = await node.complete(PROMPT, max_tokens=8)
        manifest = run_dir / "checkpoints" / "node-0" / "step-00000002"
        await until(lambda: (read := checkpoints.read(manifest)) and read.held_out_loss is not None)
    assert set(answer.versions) == {2}
    noted = checkpoints.read(manifest)
    assert noted is not None
    assert noted.held_out_loss == pytest.approx(found.held_out_loss)
    assert noted.held_out_loss == pytest.approx(loss_on_held_out(manifest), abs=1e-4)


async def test_a_version_that_does_worse_is_not_served_and_the_next_good_one_is(tmp_path: Path) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    run_dir.mkdir()
    save_tiny_model("llama", model)
    async with (
        running_node(model, 2, run_dir) as node,
        guarded(node, model, run_dir, learning_rate=0.02, max_held_out_rise=9.0),
    ):
        await first_evaluated(node)
        await publish(node, [HELD_OUT] * 20)
        await weights_when(node, lambda found: found.version == 20 and found.published)
        await publish(node, random_batches(4, 1, seed=5), first=20)
        bad = await weights_when(node, lambda found: (found.last_withheld or 0) > 20)
        answer = await node.complete(PROMPT, max_tokens=8)
        assert set(answer.versions) == {bad.published}
        assert bad.published is not None and bad.last_withheld is not None
        assert 0 < bad.published < bad.last_withheld
        await publish(node, [HELD_OUT] * 20, first=24)
        good = await weights_when(node, lambda found: (found.published or 0) > 24)
        answer = await node.complete(PROMPT, max_tokens=8)
    assert good.published is not None and min(answer.versions) >= good.published


async def test_an_evaluation_survives_the_restart_of_a_stage(tmp_path: Path) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    run_dir.mkdir()
    save_tiny_model("llama", model)
    async with (
        running_node(model, 2, run_dir) as node,
        guarded(node, model, run_dir, learning_rate=0.003, max_held_out_rise=0.5),
    ):
        await first_evaluated(node)
        await publish(node, [HELD_OUT, HELD_OUT])
        await node.replace(1)
        await weights_when(node, lambda found: found.version == 2)
        await publish(node, [HELD_OUT] * 4, first=2)
        await weights_when(node, lambda found: found.published == 6)
