"""Batches without finite gradients, on real stages: skipped together, put aside; serving goes on."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.trainer.service import Trainer
from services.trainer.settings import TrainerSettings
from shared.clock import SystemClock
from shared.messages.training import RejectedBatch
from shared.messages.weights import RollBackWeights, WeightsRequest, WeightsStatus
from shared.subjects import BATCHES, NODE_WEIGHTS, ROLLBACK
from shared.telemetry import Telemetry
from tests.integration.test_trainer_with_stages import Applied, durable
from tests.support.models import save_tiny_model
from tests.support.node import DEADLINE_S, Node, running_node
from tests.support.training import ADAMW
from tests.support.waiting import until

PROMPT = [3, 14, 15, 92, 65, 35]
OVERFLOWING = 95
"""A token whose embedding is so large that its square overflows in float32."""


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_tiny_model("llama", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][OVERFLOWING] = torch.finfo(torch.float32).max
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@asynccontextmanager
async def running_trainer(node: Node, model: Path, run_dir: Path) -> AsyncIterator[None]:
    settings = TrainerSettings(
        model=str(model),
        run_dir=run_dir,
        microbatches=2,
        max_skips=2,
        checkpoint_every=1,
        checkpoint_idle_s=0.0,
        keep_checkpoints=9,
    )
    trainer = Trainer(settings, bus=node.bus, clock=SystemClock(), telemetry=Telemetry("trainer", None))
    task = asyncio.create_task(trainer.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()


async def publish(node: Node, batch_id: str, *, overflows: bool = False) -> None:
    tokens = [5, OVERFLOWING if overflows else 6, 7, 8]
    examples = [{"token_ids": [1, 2, 3]}, {"token_ids": tokens}]
    body = json.dumps({"id": batch_id, "examples": examples}).encode()
    await node.bus.publish_durable(BATCHES, body)


def rejected(node: Node) -> list[tuple[str, str]]:
    stream = node.workers.broker.streams["LEMIX_REJECTED"]
    found = [RejectedBatch.model_validate_json(body) for body, _ in stream.messages]
    return [(each.batch_id, each.reason) for each in found]


Told = tuple[list[int], list[float | None], set[int]]


async def answer(node: Node) -> Told:
    """Tokens, their log-probabilities, and the versions that made them."""
    done = await node.complete(PROMPT, max_tokens=8, num_logprobs=0)
    assert done.finish == "length"
    return done.token_ids, [token.logprob for token in done.tokens], set(done.versions)


def assert_same(found: Told, expected: Told) -> None:
    """Log-probabilities within rounding: weights that have lasted are packed, and summed in another order."""
    assert (found[0], found[2]) == (expected[0], expected[2])
    assert found[1] == pytest.approx(expected[1], abs=1e-5)


async def status(node: Node) -> WeightsStatus:
    return await node.bus.request(NODE_WEIGHTS.at(), WeightsRequest(), timeout_s=DEADLINE_S)


async def test_a_batch_that_overflows_is_put_aside_and_training_stops_when_it_is_not_alone(
    model_folder: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    applied = Applied()
    async with running_node(model_folder, 2, run_dir, **ADAMW) as node:
        await applied.start(node)
        async with running_trainer(node, model_folder, run_dir):
            await publish(node, "good")
            await durable(run_dir, version=1)
            before = await answer(node)

            await publish(node, "bad", overflows=True)
            await until(lambda: len(rejected(node)) == 1)
            ((batch_id, reason),) = rejected(node)
            assert batch_id == "bad" and reason.startswith("its gradients are not finite")
            assert_same(await answer(node), before)

            await publish(node, "better")
            await durable(run_dir, version=2)
            before = await answer(node)
            assert before[2] == {2}

            for batch_id in ("worse", "worst"):
                await publish(node, batch_id, overflows=True)
            await until(lambda: len(rejected(node)) == 3)
            await publish(node, "late")
            assert_same(await answer(node), before)
            (stopped,) = (await status(node)).nodes
            assert (stopped.version, stopped.durable_version) == (2, 2)
            assert stopped.halt_reason == "the gradients of 2 batches in a row were not finite"

            await node.bus.request(ROLLBACK.at(), RollBackWeights(version=1), timeout_s=DEADLINE_S)
            found = await durable(run_dir, version=2)
            await until(lambda: len(rejected(node)) == 3)
            assert found.manifest.recent_batch_ids == ("good", "late")
            assert (await status(node)).nodes[0].halt_reason == ""
