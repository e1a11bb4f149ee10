"""Packed segments in one launch give the numbers and gradients of segments one after the other."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.model import attention
from shared.model.attention import PackedSegments
from shared.model.varlen import Varlen, installed_varlen, varlen_for
from tests.support.flash_attention import FLASH_2, TORCH

LENGTHS = (5, 1, 9)
NUM_HEADS, HEAD_DIM = 4, 8


def installed(**modules: Any) -> Callable[[str], Any]:
    def load(name: str) -> Any:
        if (key := name.replace(".", "_")) not in modules:
            raise ImportError(name)
        return modules[key]

    return load


WAYS = {
    "torch": installed(torch_nn_attention_varlen=TORCH, flash_attn=FLASH_2),
    "flash": installed(flash_attn=FLASH_2),
}


def attended(rows: list[Tensor], sliding_window: int | None) -> list[Tensor]:
    """The output, and the gradients of queries, keys and values."""
    leaves = [each.clone().requires_grad_() for each in rows]
    output = PackedSegments(LENGTHS).attend(0, *leaves, scaling=0.4, sliding_window=sliding_window)
    torch.autograd.backward(output, torch.linspace(-1, 1, output.numel()).view_as(output))
    return [output.detach(), *(each.grad for each in leaves if each.grad is not None)]


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("way", WAYS)
def test_one_launch_gives_the_numbers_and_gradients_of_many(
    way: str, sliding_window: int | None, num_kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    heads = (NUM_HEADS, num_kv_heads, num_kv_heads)
    rows = [torch.randn(1, number, sum(LENGTHS), HEAD_DIM) for number in heads]
    expected = attended(rows, sliding_window)
    found = installed_varlen(WAYS[way])
    assert found is not None
    monkeypatch.setattr(attention, "varlen_for", lambda like: found)
    torch.testing.assert_close(attended(rows, sliding_window), expected)


def test_torchs_own_comes_first_unless_it_lacks_what_is_needed() -> None:
    assert installed_varlen(WAYS["torch"]) == Varlen(TORCH.varlen_attn, is_torch=True)

    def older(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> None: ...

    with_older = installed(torch_nn_attention_varlen=SimpleNamespace(varlen_attn=older), flash_attn=FLASH_2)
    assert installed_varlen(with_older) == Varlen(FLASH_2.flash_attn_varlen_func, is_torch=False)
    assert installed_varlen(installed()) is None


def test_the_torch_that_is_installed_has_what_is_needed() -> None:
    found = installed_varlen()
    assert found is not None
    assert found.is_torch


def test_a_cpu_has_no_such_way() -> None:
    assert varlen_for(torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)) is None
