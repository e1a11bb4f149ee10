"""Kernels of installed packages, in the place of which stand plain functions with the same signatures."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from services.stage_worker.compute.attention.chunks import Chunk
from services.stage_worker.compute.attention.in_place import InPlaceDecoder
from services.stage_worker.compute.attention.iteration import PagedAttention
from services.stage_worker.compute.attention.kernels import installed_kernels, is_right, kernel_for
from services.stage_worker.compute.attention.static import StaticAttention
from services.stage_worker.compute.kv_cache import PagedKVCache
from tests.support.flash_attention import FLASH_2, FLASH_3, FLASH_4
from tests.support.flashinfer import FLASHINFER

AMPERE, HOPPER, BLACKWELL = 8, 9, 10
FAKES = {
    "flash_attn_interface": FLASH_3,
    "flash_attn": FLASH_2,
    "flash_attn.cute": FLASH_4,
    "flashinfer.decode": FLASHINFER,
}
NUM_BLOCKS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 4, 2, 8


def installed(**modules: Any) -> Callable[[str], Any]:
    def load(name: str) -> Any:
        if name not in modules:
            raise ImportError(name)
        return modules[name]

    return load


def filled_cache(block_size: int) -> PagedKVCache:
    """Every slot holds something, as those of earlier sequences do."""
    cache = PagedKVCache(1, NUM_BLOCKS, block_size, NUM_KV_HEADS, HEAD_DIM)
    slots = torch.arange((NUM_BLOCKS + 1) * block_size)
    cache.write(0, slots, torch.randn(2 * NUM_KV_HEADS, len(slots), HEAD_DIM))
    return cache


@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize(
    ("module", "block_size"),
    [("flash_attn_interface", 4), ("flash_attn", 256), ("flash_attn.cute", 4), ("flashinfer.decode", 16)],
)
def test_rows_over_blocks_in_place_give_the_numbers_of_rows_over_copies(
    module: str, block_size: int, sliding_window: int | None
) -> None:
    torch.manual_seed(4)
    cache = filled_cache(block_size)
    (kernel,) = installed_kernels(block_size, HOPPER, installed(**{module: FAKES[module]}))
    assert is_right(kernel, cache, NUM_HEADS, sliding_window)
    chunks = [Chunk(block_size + 1, 1, [3, 0]), Chunk(0, 1, [5]), Chunk(block_size - 1, 1, [2, 1])]
    query_TND = torch.randn(3, NUM_HEADS, HEAD_DIM)
    key_value_TXD = torch.randn(3, 2 * NUM_KV_HEADS, HEAD_DIM)
    wanted = {"scaling": 0.3, "sliding_window": sliding_window}

    def output(attention: Any) -> Tensor:
        found: Tensor = attention.attend_joined(0, query_TND, key_value_TXD, **wanted)
        return found

    expected = output(PagedAttention(cache, chunks))
    as_they_come = output(PagedAttention(cache, chunks, InPlaceDecoder(cache, kernel)))
    slots = cache.integers([1, 5 * block_size, 2 * block_size + block_size - 1])
    table = torch.tensor([[3, 0, 6], [5, 6, 6], [2, 6, 6]], dtype=torch.int32)
    lengths = cache.integers([chunk.end for chunk in chunks])
    in_a_step = output(StaticAttention(cache, slots, lengths, table, kernel))
    torch.testing.assert_close(as_they_come, expected)
    torch.testing.assert_close(in_a_step, expected)


def test_the_best_kernel_that_takes_the_blocks_on_the_device_comes_first() -> None:
    everything = installed(**FAKES)

    def found(block_size: int, generation: int) -> list[str]:
        kernels = installed_kernels(block_size, generation, everything)
        return [getattr(one, "table_name", type(one).__name__) for one in kernels]

    assert found(16, HOPPER) == ["page_table", "FlashInferKernel", "Flash4Kernel"]
    assert found(256, HOPPER) == ["page_table", "Flash4Kernel", "block_table"]
    assert found(16, BLACKWELL) == ["FlashInferKernel", "Flash4Kernel"]
    assert found(16, AMPERE) == []
    assert found(256, AMPERE) == ["block_table"]
    assert list(installed_kernels(256, HOPPER, installed())) == []
    assert list(installed_kernels(16, HOPPER, installed(**{"flashinfer.decode": SimpleNamespace()}))) == []


def test_a_kernel_that_gives_other_numbers_or_fails_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(*args: Any, **options: Any) -> Tensor:
        right: Tensor = FLASH_3.flash_attn_with_kvcache(*args, **options)
        return right + 0.1

    def failing(*args: Any, **options: Any) -> Tensor:
        raise FileNotFoundError("there is no compiler")

    cache = filled_cache(4)
    for function in (wrong, failing):
        module = SimpleNamespace(flash_attn_with_kvcache=function)
        (kernel,) = installed_kernels(4, HOPPER, installed(flash_attn_interface=module))
        assert not is_right(kernel, cache, NUM_HEADS)
    assert "other numbers" in caplog.text
    assert "there is no compiler" in caplog.text


def test_a_cpu_has_no_kernel() -> None:
    assert kernel_for(filled_cache(4), NUM_HEADS, None) is None
