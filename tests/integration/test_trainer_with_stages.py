"""The trainer in front of real stages: its checkpoints against one process, and across a restart."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.trainer.service import Trainer
from services.trainer.settings import TrainerSettings
from services.trainer.streams import TRAIN_STREAM
from shared import checkpoints
from shared.bus.base import Incoming
from shared.checkpoints import Checkpoint
from shared.clock import SystemClock
from shared.messages.inference import Placed, TaskEnded
from shared.messages.training import TrainingTask
from shared.subjects import BATCHES, ENDED, PLACE
from shared.telemetry import Telemetry
from tests.support.models import NUM_LAYERS, save_tiny_model
from tests.support.node import Node, running_node
from tests.support.training import ADAMW, LEARNING_RATE, adamw, loss_of, num_labels, random_batches
from tests.support.waiting import until

DEADLINE_S = 60.0
BATCHES_OF_THE_RUN = random_batches(6, 2)


@asynccontextmanager
async def running_trainer(node: Node, model: Path, run_dir: Path) -> AsyncIterator[None]:
    settings = TrainerSettings(
        model=str(model),
        run_dir=run_dir,
        schedule="1f1b",
        microbatches=1,
        learning_rate=LEARNING_RATE,
        max_gradient_norm=inf,
        checkpoint_every=2,
        checkpoint_idle_s=0.0,
    )
    telemetry = Telemetry("trainer", None)
    trainer = Trainer(settings, bus=node.bus, clock=SystemClock(), telemetry=telemetry)
    task = asyncio.create_task(trainer.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()


class Applied:
    """Plays the scheduler; counts the batches that have ended."""

    def __init__(self) -> None:
        self.num = 0
        self._changed = asyncio.Event()

    async def start(self, node: Node) -> None:
        await node.bus.ensure_stream(TRAIN_STREAM)
        await node.bus.respond(PLACE.at(), self._place)
        await node.bus.subscribe(ENDED.at(), self._ended)

    async def until(self, num: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.num < num:
                self._changed.clear()
                await self._changed.wait()

    async def _place(self, incoming: Incoming[TrainingTask]) -> Placed:
        return Placed(node=0)

    async def _ended(self, incoming: Incoming[TaskEnded]) -> None:
        self.num += len(incoming.message.task_ids)
        self._changed.set()


async def publish(node: Node, start: int, stop: int) -> None:
    for number in range(start, stop):
        examples = [{"token_ids": example} for part in BATCHES_OF_THE_RUN[number] for example in part]
        body = json.dumps({"id": f"b{number}", "examples": examples}).encode()
        await node.bus.publish_durable(BATCHES, body)


async def durable(run_dir: Path, version: int) -> Checkpoint:
    """The checkpoint of `version`, once it is there."""
    root = run_dir / "checkpoints"
    await until(lambda: (found := checkpoints.latest(root, 0)) and found.manifest.version == version)
    found = checkpoints.latest(root, 0)
    assert found is not None
    return found


def trained_in_one_process(model: Any) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters.values())
    for batch in BATCHES_OF_THE_RUN:
        examples = [example for part in batch for example in part]
        optimizer.zero_grad()
        loss_of(model, parameters, examples, num_labels(batch)).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize(("family", "num_stages"), [("llama", 1), ("llama", 2), ("gpt2", 2)])
async def test_a_trainer_that_was_ended_goes_on_to_the_weights_of_an_uninterrupted_run(
    family: str, num_stages: int, tmp_path: Path
) -> None:
    model_folder, run_dir = tmp_path / "model", tmp_path / "run"
    run_dir.mkdir()
    model = save_tiny_model(family, model_folder)
    applied = Applied()
    async with running_node(model_folder, num_stages, run_dir, **ADAMW) as node:
        await applied.start(node)
        await publish(node, 0, 4)
        async with running_trainer(node, model_folder, run_dir):
            await applied.until(3)
        await publish(node, 3, 6)
        async with running_trainer(node, model_folder, run_dir):
            checkpoint = await durable(run_dir, version=6)

    assert checkpoint.manifest.recent_batch_ids == tuple(f"b{number}" for number in range(6))
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    expected = trained_in_one_process(model)
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-5)


def tensors_in(checkpoint: Path) -> dict[str, Tensor]:
    """Weights and optimizer state; random states are those of this process, whose stages share them."""
    found: dict[str, Tensor] = {}
    for path in checkpoint.glob("*.safetensors"):
        found.update(load_file(path))
    return {name: tensor for name, tensor in found.items() if not name.startswith("random.")}


async def test_an_adapter_goes_on_after_all_were_restarted_as_if_nothing_had_been(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tiny_model("llama_tied", model)

    async def train(run_dir: Path, *, restart: bool) -> Checkpoint:
        applied = Applied()
        async with running_node(model, 2, run_dir, adapter="lora", lora_rank=4, **ADAMW) as node:
            await applied.start(node)
            await publish(node, 0, 4)
            if restart:
                async with running_trainer(node, model, run_dir):
                    await durable(run_dir, version=4)
                for stage in range(2):
                    await node.replace(stage)
                await node.ready()
            await publish(node, 4, 6)
            async with running_trainer(node, model, run_dir):
                return await durable(run_dir, version=6)

    for name in ("undisturbed", "restarted"):
        (tmp_path / name).mkdir()
    undisturbed = await train(tmp_path / "undisturbed", restart=False)
    restarted = await train(tmp_path / "restarted", restart=True)

    assert restarted.manifest.adapter == "lora"
    learnt, expected = tensors_in(restarted.folder), tensors_in(undisturbed.folder)
    assert learnt.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(learnt[name], tensor), name
    assert {path.name for path in restarted.folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "lemix.json",
        "optimizer-00001-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
    }
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), restarted.folder)
    trained = [tensor for name, tensor in loaded.named_parameters() if "lora_B" in name]
    assert len(trained) == NUM_LAYERS * 7
    assert all(tensor.any() for tensor in trained)


async def test_an_adapter_is_loaded_by_any_number_of_stages(tmp_path: Path) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    run_dir.mkdir()
    save_tiny_model("llama", model)
    lora: dict[str, Any] = {"adapter": "lora", "lora_rank": 4, **ADAMW}
    applied = Applied()
    async with running_node(model, 2, run_dir, **lora) as node:
        await applied.start(node)
        await publish(node, 0, 2)
        async with running_trainer(node, model, run_dir):
            await durable(run_dir, version=2)
        served = await node.complete([5, 9, 2], prompt_logprobs=True, max_tokens=8, num_logprobs=0)
    async with running_node(model, 3, run_dir, **lora) as node:
        again = await node.complete([5, 9, 2], prompt_logprobs=True, max_tokens=8, num_logprobs=0)
    assert (served.versions[-1], again.versions[-1]) == (2, 2)
    assert again.token_ids == served.token_ids
    logprobs = [[token.logprob for token in answer.tokens] for answer in (served, again)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
