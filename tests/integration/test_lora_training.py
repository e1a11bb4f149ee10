"""A node's LoRA training against one process with peft, and what is served and saved on the way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.trainer.adapter_file import join_adapter
from shared import checkpoints
from shared.messages.training import ShardSaved
from tests.integration.test_pipeline_training import (
    Feeder,
    assert_equal,
    train_in_one_process,
    train_with_delayed_weights,
)
from tests.support.models import save_tiny_model
from tests.support.node import Node, running_node
from tests.support.training import ADAMW, random_batches

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
"""What peft asks of transformers when a test loads a whole model; stages do not."""

NUM_BATCHES = 4
LORA: dict[str, Any] = {"adapter": "lora", "lora_rank": 4, "lora_alpha": 12, **ADAMW}


async def saved_adapter(node: Node, version: int, folder: Path) -> dict[str, int]:
    """Save the node's adapter as the trainer does; returns which stage has each tensor, by peft's name."""
    folder.mkdir(parents=True)  # noqa: ASYNC240
    await node.save(version, folder)
    files: dict[str, str] = {}
    for _ in range(node.num_stages):
        event = (await node.report()).event
        assert isinstance(event, ShardSaved), event
        assert event.adapter == "lora"
        files.update(event.file_by_tensor)
    join_adapter(folder, sorted(set(files.values())))
    return {
        _module_name(name): int(file.removeprefix("adapter_model-")[:5]) - 1 for name, file in files.items()
    }


def _module_name(name: str) -> str:
    """What a tensor of an adapter's file is called in a model that has loaded it."""
    return name.replace(".weight", ".default.weight")


def adapted(model: Path, adapter: Path) -> Any:
    """The model as peft loads it, in evaluation mode."""
    base = AutoModelForCausalLM.from_pretrained(model)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()


def adapter_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters() if "lora_" in name}


def saved_in(folder: Path) -> dict[str, Tensor]:
    return {
        _module_name(name): tensor for name, tensor in load_file(folder / checkpoints.ADAPTER_NAME).items()
    }


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
    save_tiny_model(family, tmp_path / "model")
    batches = random_batches(NUM_BATCHES, 2)
    async with running_node(tmp_path / "model", num_stages, tmp_path, **LORA) as node:
        await node.restore()
        stage_of = await saved_adapter(node, 0, tmp_path / "checkpoints" / "start")
        feeder = Feeder(node)
        await feeder.sync(batches)
        await saved_adapter(node, NUM_BATCHES, tmp_path / "checkpoints" / "end")
        answer = await node.complete([5, 9, 2, 40, 7], prompt_logprobs=True, max_tokens=6, num_logprobs=0)
    reference = adapted(tmp_path / "model", tmp_path / "checkpoints" / "start")
    start = {name: tensor.clone() for name, tensor in adapter_of(reference).items()}
    assert start.keys() == stage_of.keys()
    losses = train_in_one_process(reference, batches)
    assert list(feeder.losses.values()) == pytest.approx(losses, abs=1e-5)
    end = saved_in(tmp_path / "checkpoints" / "end")
    assert_equal(end, adapter_of(reference))
    moved = [name for name, tensor in end.items() if not torch.equal(tensor, start[name])]
    assert len(moved) == len(end)
    assert_served(answer, reference.merge_and_unload())


def assert_served(answer: Any, merged: Any) -> None:
    """Every log-probability of prompt and completion is that of the merged model."""
    tokens = [*answer.task.prompt, *answer.token_ids]
    with torch.no_grad():
        logprobs = merged(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = [logprobs[row, token].item() for row, token in enumerate(tokens[1:])]
    got = [one.logprob for one in (*answer.prompt, *answer.tokens) if one.logprob is not None]
    assert got[-len(expected) :] == pytest.approx(expected, abs=1e-4)


async def test_asynchronous_training_equals_delayed_adapters(tmp_path: Path) -> None:
    save_tiny_model("llama_tied", tmp_path / "model")
    batches = random_batches(6, 2)
    async with running_node(tmp_path / "model", 3, tmp_path, **LORA) as node:
        await node.restore()
        stage_of = await saved_adapter(node, 0, tmp_path / "checkpoints" / "start")
        feeder = Feeder(node)
        await feeder.asynchronous(batches)
        await saved_adapter(node, len(batches), tmp_path / "checkpoints" / "end")
    reference = adapted(tmp_path / "model", tmp_path / "checkpoints" / "start")
    losses = train_with_delayed_weights(reference, batches, stage_of, feeder.versions)
    delayed = {number for (_, batch_id, _), number in feeder.versions.items() if int(batch_id[1:]) > number}
    assert delayed, "no forward ran with delayed weights: the schedule did not overlap"
    assert list(feeder.losses.values()) == pytest.approx(losses, abs=1e-5)
    assert_equal(saved_in(tmp_path / "checkpoints" / "end"), adapter_of(reference))


async def test_a_restore_takes_the_node_back_to_where_its_adapter_began(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    batches = random_batches(2, 1)
    async with running_node(tmp_path / "model", 2, tmp_path, **LORA) as node:
        await node.restore()
        await saved_adapter(node, 0, tmp_path / "checkpoints" / "start")
        feeder = Feeder(node)
        await feeder.sync(batches)
        await saved_adapter(node, 2, tmp_path / "checkpoints" / "end")
        await node.restore()
        await saved_adapter(node, 0, tmp_path / "checkpoints" / "again")
    start, end, again = (saved_in(tmp_path / "checkpoints" / name) for name in ("start", "end", "again"))
    assert all(torch.equal(again[name], tensor) for name, tensor in start.items())
    assert not any(torch.equal(end[name], tensor) for name, tensor in start.items())
