"""Shards of an adapter against the safetensors library."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.trainer.checkpoints.adapter_file import join_adapter


def test_the_joined_file_has_all_tensors(tmp_path: Path) -> None:
    shards = [
        {"b.lora_A.weight": torch.randn(2, 3), "b.lora_B.weight": torch.randn(5, 2)},
        {"a.lora_A.weight": torch.randn(1, 7), "scalar": torch.tensor(3, dtype=torch.int8)},
        {},
    ]
    for number, tensors in enumerate(shards):
        save_file(tensors, tmp_path / f"part-{number}", metadata={"format": "pt"})

    digest = join_adapter(tmp_path, [f"part-{number}" for number in range(3)])

    (path,) = tmp_path.iterdir()
    assert path.name == "adapter_model.safetensors"
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    joined = load_file(path)
    expected = {name: tensor for tensors in shards for name, tensor in tensors.items()}
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in expected.items())


def test_a_shard_that_is_gone_is_an_error_of_the_disk(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "part-0")
    with pytest.raises(FileNotFoundError):
        join_adapter(tmp_path, ["part-0", "part-1"])
    assert [path.name for path in tmp_path.iterdir()] == ["part-0"]
