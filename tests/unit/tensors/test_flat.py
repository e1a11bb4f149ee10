"""A copy of many tensors in one piece."""

import pytest
import torch
from torch.nn import Parameter

from shared.tensors.flat import FlatTensors

CPU = torch.device("cpu")


def weights() -> dict[str, torch.Tensor]:
    return {
        "matrix": Parameter(torch.arange(6.0).view(2, 3)),
        "scalar": torch.tensor(7.0),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "turned": torch.arange(6.0).view(2, 3).t(),
    }


def test_all_tensors_lie_one_after_the_other_in_float32() -> None:
    tensors = weights()
    copy = FlatTensors(tensors, CPU)
    copy.copy_from(tensors)
    assert copy.flat.dtype == torch.float32
    assert copy.flat.tolist() == [0, 1, 2, 3, 4, 5, 7, 1.5, -2, 0, 3, 1, 4, 2, 5]


def test_what_is_done_to_the_whole_is_seen_in_the_parts_and_copied_back() -> None:
    tensors = weights()
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    copy = FlatTensors(tensors, CPU)
    copy.copy_from(tensors)
    copy.flat.mul_(2)
    assert torch.equal(copy.views["matrix"], 2 * before["matrix"])
    copy.copy_to(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, 2 * before[name])
        assert tensor.dtype == before[name].dtype
    assert tensors["matrix"].requires_grad


def test_a_copy_is_private() -> None:
    tensors = weights()
    copy = FlatTensors(tensors, CPU)
    copy.copy_from(tensors)
    tensors["scalar"].fill_(0)
    assert copy.views["scalar"] == 7


def test_other_shapes_are_not_stretched() -> None:
    copy = FlatTensors({"vector": torch.empty(3, device="meta")}, CPU)
    with pytest.raises(AssertionError):
        copy.copy_from({"vector": torch.ones(1)})
