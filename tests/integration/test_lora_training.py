"""A node's LoRA training against one process with peft, and what is served and saved on the way."""

from pathlib import Path

import pytest
import torch

from tests.integration.test_pipeline_training import Feeder
from tests.support.delayed import Reference, stage_of_tensors
from tests.support.models import save_tiny_model
from tests.support.node import running_node
from tests.support.reference import assert_served
from tests.support.saving import adapted, save, weights_in
from tests.support.training import ADAMW, LORA, assert_equal, named, random_batches

NUM_BATCHES = 4


@pytest.mark.parametrize(
    ("family", "num_stages"),
    [
        *(("llama", num_stages) for num_stages in (1, 4)),
        *(("llama_tied", 2), ("gpt2", 3), ("qwen2", 2), ("gpt_neox", 2)),
    ],
)
async def test_synchronous_training_equals_peft_in_one_process(
    family: str, num_stages: int, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    save_tiny_model(family, model)
    batches = random_batches(NUM_BATCHES, 2)
    async with running_node(model, num_stages, tmp_path, **LORA, **ADAMW) as node:
        await node.restore()
        start = await save(node, model, 0, tmp_path / "checkpoints" / "start")
        feeder = Feeder(node)
        await feeder.sync(batches)
        end = await save(node, model, NUM_BATCHES, tmp_path / "checkpoints" / "end")
        answer = await node.complete([5, 9, 2, 40, 7], prompt_logprobs=True, max_tokens=6, num_logprobs=0)
    reference = Reference(adapted(model, start), stage_of_tensors(end))
    before = reference.weights()
    assert before.keys() == stage_of_tensors(end).keys()
    reference.learn(named(batches))
    assert list(feeder.losses.values()) == pytest.approx(reference.losses, abs=1e-5)
    after = weights_in(end)
    assert_equal(after, reference.weights())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert_served(answer, reference.model.merge_and_unload())


async def test_asynchronous_training_equals_delayed_adapters(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tiny_model("llama_tied", model)
    batches = random_batches(6, 2)
    async with running_node(model, 3, tmp_path, **LORA, **ADAMW) as node:
        await node.restore()
        start = await save(node, model, 0, tmp_path / "checkpoints" / "start")
        feeder = Feeder(node)
        await feeder.asynchronous(batches)
        end = await save(node, model, len(batches), tmp_path / "checkpoints" / "end")
    reference = Reference(adapted(model, start), stage_of_tensors(end))
    reference.learn(named(batches), feeder.versions)
    delayed = {number for (_, batch_id, _), number in feeder.versions.items() if int(batch_id[1:]) > number}
    assert delayed, "no forward ran with delayed weights: the schedule did not overlap"
    assert list(feeder.losses.values()) == pytest.approx(reference.losses, abs=1e-5)
    assert_equal(weights_in(end), reference.weights())


async def test_a_restore_takes_the_node_back_to_where_its_adapter_began(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tiny_model("llama", model)
    batches = random_batches(2, 1)
    root = tmp_path / "checkpoints"
    async with running_node(model, 2, tmp_path, **LORA, **ADAMW) as node:
        await node.restore()
        start = weights_in(await save(node, model, 0, root / "start"))
        feeder = Feeder(node)
        await feeder.sync(batches)
        end = weights_in(await save(node, model, 2, root / "end"))
        await node.restore(fence=2)
        again = weights_in(await save(node, model, 0, root / "again", fence=2))
    assert all(torch.equal(again[name], tensor) for name, tensor in start.items())
    assert not any(torch.equal(end[name], tensor) for name, tensor in start.items())
