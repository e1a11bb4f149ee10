"""Kernels that read blocks of the KV cache in place, where a package has brought one.

FlashAttention 3 takes blocks of any size, FlashAttention 2 of multiples of 256. What is installed is tried
before it is used, against the way that needs no package.

Shape letters: B rows of one token, N query heads, K heads of keys, P blocks, S tokens of a block, C blocks of
a row's context, D head size.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from services.stage_worker.compute.attention.rows import attend_rows, decode_mask
from services.stage_worker.compute.kv_cache import PagedKVCache

_PACKAGES: Final = (("flash_attn_interface", "page_table", 1), ("flash_attn", "block_table", 256))
"""Modules with `flash_attn_with_kvcache`, the best first; how it calls the table of blocks, and what their
size must be a multiple of."""
_HALF: Final = (torch.bfloat16, torch.float16)
_TOLERANCE: Final = 0.03
"""The largest difference between numbers about 1 in bfloat16."""

logger = logging.getLogger(__name__)


class PagedKernel(Protocol):
    """Attention of rows of one token over the blocks of their contexts."""

    def __call__(
        self,
        query_BND: Tensor,
        key_PSKD: Tensor,
        value_PSKD: Tensor,
        length_B: Tensor,
        block_BC: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        """The output [B, N, D]. `length_B` and `block_BC` are int32."""
        ...


@dataclass(frozen=True, slots=True)
class FlashKernel:
    """Implements `PagedKernel` by FlashAttention."""

    attend: Callable[..., Tensor]
    """`flash_attn_with_kvcache`."""
    table_name: str

    def __call__(
        self,
        query_BND: Tensor,
        key_PSKD: Tensor,
        value_PSKD: Tensor,
        length_B: Tensor,
        block_BC: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        table: dict[str, Any] = {self.table_name: block_BC}
        output_B1ND = self.attend(
            query_BND.unsqueeze(1),
            key_PSKD,
            value_PSKD,
            cache_seqlens=length_B,
            softmax_scale=scaling,
            causal=True,
            window_size=window,
            **table,
        )
        return output_B1ND.squeeze(1)


def kernel_for(cache: PagedKVCache) -> PagedKernel | None:
    """The best kernel for this cache; None where there is none: kernels want a GPU and 16 bits."""
    if cache.device == "cpu" or cache.dtype not in _HALF:
        return None
    return next((kernel for kernel in installed_kernels(cache.block_size) if is_right(kernel, cache)), None)


def installed_kernels(block_size: int, load: Callable[[str], Any] = import_module) -> Iterator[FlashKernel]:
    """Those that take blocks of that size, the best first; `load` imports a module by its name."""
    for name, table_name, multiple in _PACKAGES:
        if block_size % multiple:
            continue
        try:
            module = load(name)
        except ImportError:
            continue
        yield FlashKernel(module.flash_attn_with_kvcache, table_name)


def is_right(kernel: PagedKernel, cache: PagedKVCache) -> bool:
    """Whether a kernel gives what it should, on the block of the cache that belongs to no sequence."""
    block, size = cache.dummy_block, cache.block_size
    randn = partial(torch.randn, dtype=cache.dtype, device=cache.device)
    query_BND = randn(1, cache.num_kv_heads, cache.head_dim)
    key_value_XSD = randn(2 * cache.num_kv_heads, size, cache.head_dim)
    cache.write(0, cache.integers(range(block * size, (block + 1) * size)), key_value_XSD)
    length_B = torch.tensor([size - 1], dtype=torch.int32, device=cache.device)
    block_BC = torch.tensor([[block]], dtype=torch.int32, device=cache.device)
    key_BKLD, value_BKLD = key_value_XSD.unsqueeze(0).chunk(2, dim=1)
    mask = decode_mask(length_B.view(-1, 1, 1, 1), size, None, query_BND)
    expected = attend_rows(query_BND, key_BKLD, value_BKLD, mask, 1.0)
    try:
        found = kernel(query_BND, *cache.pages(0), length_B, block_BC, scaling=1.0, sliding_window=None)
    except (RuntimeError, TypeError, ValueError) as error:
        logger.warning("an attention kernel is installed, but fails: %s", error)
        return False
    if not torch.allclose(found, expected, rtol=0, atol=_TOLERANCE):
        logger.warning("an attention kernel is installed, but gives other numbers than it should")
        return False
    return True
