"""The checkpoints of a node's stages, written as the trainer has them written, and the models in them."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.trainer.checkpoints.adapter_file import join_adapter
from shared import checkpoints
from shared.messages.training import ShardSaved
from shared.model.index import write_index
from tests.support.node import Node


async def save(node: Node, model: Path, version: int, checkpoint: Path, *, fence: int = 1) -> Path:
    """A checkpoint as the trainer would have it, without its manifest."""
    checkpoint.mkdir(parents=True)  # noqa: ASYNC240
    shutil.copy(model / "config.json", checkpoint)
    await node.save(version, checkpoint, fence=fence)
    shards = [report.event for report in await node.told(ShardSaved)]
    files = {name: file for shard in shards for name, file in shard.file_by_tensor.items()}
    if {shard.adapter for shard in shards} == {"lora"}:
        join_adapter(checkpoint, sorted(set(files.values())))
    else:
        write_index(checkpoint, files, 0)
    return checkpoint


def tensors_in(checkpoint: Path, files: str = "*.safetensors") -> dict[str, Tensor]:
    """Weights and optimizer state of all stages; what two of them hold is the same."""
    found: dict[str, Tensor] = {}
    for path in sorted(checkpoint.glob(files)):
        for name, tensor in load_file(path).items():
            assert name not in found or torch.equal(found[name], tensor), name
            found[name] = tensor
    return found


def weights_in(checkpoint: Path) -> dict[str, Tensor]:
    """The trained tensors, by their names in stages."""
    found = tensors_in(checkpoint, "*model*.safetensors")
    return {name_in_stages(name): tensor for name, tensor in found.items()}


def name_in_stages(name: str) -> str:
    """The name in stages of a tensor that peft names otherwise, in its files or in a model."""
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def adapted(model: Path, adapter: Path) -> Any:
    """The model as peft loads it, in evaluation mode; the adapter trains."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()


def model_in(checkpoint: Path, model: Path) -> Any:
    """The whole model of a checkpoint of `model`, an adapter merged into it."""
    if (checkpoint / checkpoints.ADAPTER_NAME).exists():
        return adapted(model, checkpoint).merge_and_unload()
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
