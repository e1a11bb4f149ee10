"""A node's training against one process: losses and weights of the same batches in the same order."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from shared.messages.training import BatchStepped
from tests.support.delayed import Reference, stage_of_tensors
from tests.support.models import save_tiny_model
from tests.support.node import Node, running_node
from tests.support.saving import save
from tests.support.training import (
    ADAMW,
    Batch,
    adamw,
    assert_equal,
    loss_of,
    messages,
    named,
    num_labels,
    random_batches,
)

NUM_BATCHES = 4


class Feeder:
    """Feeds batches as the trainer does and keeps what the node reports."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.losses: dict[str, float] = {}

    @property
    def versions(self) -> dict[tuple[int, str, int], int]:
        return self._node.versions

    async def wait_for(self, batch_id: str) -> None:
        while batch_id not in self.losses:
            event = (await self._node.next(BatchStepped)).event
            assert isinstance(event, BatchStepped)
            self.losses[event.batch_id] = event.loss

    async def sync(self, batches: list[Batch]) -> None:
        """S-PP: a batch enters when the one before is in all weights."""
        for number, batch in enumerate(batches):
            await self._feed(number, batch)
            await self.wait_for(f"b{number}")

    async def asynchronous(self, batches: list[Batch]) -> None:
        """A-PP: all is fed at once, and the node lets it in."""
        for number, batch in enumerate(batches):
            await self._feed(number, batch)
        await self.wait_for(f"b{len(batches) - 1}")

    async def _feed(self, number: int, batch: Batch) -> None:
        for forward in messages(f"b{number}", batch):
            await self._node.feed(forward)


async def weights_of(node: Node, version: int, folder: Path) -> dict[str, Tensor]:
    """What the node holds, through a checkpoint that transformers loads as one whole model."""
    await save(node, folder.parents[1] / "model", version, folder)
    loaded: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return loaded


def train_in_one_process(model: Any, batches: list[Batch]) -> list[float]:
    """The plain loop: one step a batch."""
    parameters = dict(model.named_parameters())
    optimizer, losses = adamw(parameters.values()), []
    for batch in batches:
        loss = torch.stack(
            [loss_of(model, parameters, examples, num_labels(batch)) for examples in batch]
        ).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("family", "num_stages", "stages_held"),
    [
        *(("llama", *stages) for stages in ((1, 1), (2, 1), (3, 1), (4, 2))),
        *(("llama_tied", *stages) for stages in ((1, 1), (2, 1), (2, 2), (3, 2))),
        *(("qwen2", 2, 1), ("mistral", 2, 2), ("gpt2", 3, 1), ("gpt_neox", 2, 2)),
    ],
)
async def test_synchronous_training_equals_one_process(
    family: str, num_stages: int, stages_held: int, tmp_path: Path
) -> None:
    model = save_tiny_model(family, tmp_path / "model")
    batches = random_batches(NUM_BATCHES, 1)
    settings = {**ADAMW, "stages_held": stages_held}
    async with running_node(tmp_path / "model", num_stages, tmp_path, **settings) as node:
        await node.restore()
        feeder = Feeder(node)
        await feeder.sync(batches)
        weights = await weights_of(node, NUM_BATCHES, tmp_path / "checkpoints" / "end")
    losses = train_in_one_process(model, batches)
    assert list(feeder.losses.values()) == pytest.approx(losses, abs=1e-5)
    assert_equal(weights, model.state_dict())


async def test_asynchronous_training_on_one_stage_equals_one_process(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    batches = random_batches(NUM_BATCHES, 3)
    async with running_node(tmp_path / "model", 1, tmp_path, **ADAMW) as node:
        await node.restore()
        feeder = Feeder(node)
        await feeder.asynchronous(batches)
        weights = await weights_of(node, NUM_BATCHES, tmp_path / "checkpoints" / "end")
    losses = train_in_one_process(model, batches)
    assert list(feeder.losses.values()) == pytest.approx(losses, abs=1e-5)
    assert_equal(weights, model.state_dict())


@pytest.mark.parametrize(("num_stages", "stages_held"), [(2, 1), (2, 2), (3, 1), (4, 2)])
async def test_asynchronous_training_equals_delayed_weights(
    num_stages: int, stages_held: int, tmp_path: Path
) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    batches = random_batches(6, 2)
    settings = {**ADAMW, "stages_held": stages_held}
    async with running_node(tmp_path / "model", num_stages, tmp_path, **settings) as node:
        await node.restore()
        feeder = Feeder(node)
        await feeder.asynchronous(batches)
        weights = await weights_of(node, len(batches), tmp_path / "checkpoints" / "end")
    reference = Reference(model, stage_of_tensors(tmp_path / "checkpoints" / "end"))
    reference.learn(named(batches), feeder.versions)
    on_time = {number for (_, batch_id, _), number in feeder.versions.items() if int(batch_id[1:]) > number}
    assert on_time or num_stages == 2, "no forward ran with delayed weights: the schedule did not overlap"
    assert list(feeder.losses.values()) == pytest.approx(reference.losses, abs=1e-5)
    assert_equal(weights, model.state_dict())
