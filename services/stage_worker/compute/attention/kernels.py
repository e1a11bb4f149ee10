"""Kernels that read blocks of the KV cache in place, where a package has brought one.

What is installed, and made for the device and for blocks of the cache's size, is tried before it is used,
against the way that needs no package.

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

from services.stage_worker.compute.attention.flash_attention import Flash4Kernel, FlashKernel
from services.stage_worker.compute.attention.flashinfer import FlashInferKernel
from services.stage_worker.compute.attention.rows import attend_rows, decode_mask
from services.stage_worker.compute.kv_cache import PagedKVCache

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
class _Package:
    """A package with a kernel, and the devices and blocks that it is made for."""

    module: str
    function: str
    kernel_of: Callable[[Any], PagedKernel]
    generations: tuple[int, ...]
    """Major numbers of the devices' compute capability."""
    takes: Callable[[int], bool]
    """Blocks of that many tokens."""


_PACKAGES: Final = (
    _Package(
        "flash_attn_interface",
        "flash_attn_with_kvcache",
        partial(FlashKernel, table_name="page_table"),
        generations=(9,),
        takes=lambda size: True,
    ),
    _Package(
        "flashinfer.decode",
        "trtllm_batch_decode_with_kv_cache",
        FlashInferKernel,
        generations=(9, 10, 12),
        takes=lambda size: size in (16, 32, 64),
    ),
    _Package(
        "flash_attn.cute",
        "flash_attn_varlen_func",
        Flash4Kernel,
        generations=(9, 10, 11),
        takes=lambda size: True,
    ),
    _Package(
        "flash_attn",
        "flash_attn_with_kvcache",
        partial(FlashKernel, table_name="block_table"),
        generations=(8, 9, 10, 11, 12),
        takes=lambda size: size % 256 == 0,
    ),
)
"""The best first: those that are made for decoding on a device come before those that do it, too. (On Hopper
FlashAttention 4 does not split contexts.)"""


def kernel_for(cache: PagedKVCache, num_heads: int, sliding_window: int | None) -> PagedKernel | None:
    """The best kernel for this cache and a model's attention.

    None where there is none: kernels want a GPU and 16 bits.
    """
    if cache.device == "cpu" or cache.dtype not in _HALF:
        return None
    generation, _ = torch.cuda.get_device_capability(cache.device)
    installed = installed_kernels(cache.block_size, generation)
    return next((one for one in installed if is_right(one, cache, num_heads, sliding_window)), None)


def installed_kernels(
    block_size: int, generation: int, load: Callable[[str], Any] = import_module
) -> Iterator[PagedKernel]:
    """Those that take blocks of that size on such devices, the best first; `load` imports a module."""
    for package in _PACKAGES:
        if generation not in package.generations or not package.takes(block_size):
            continue
        try:
            module = load(package.module)
        except ImportError:
            continue
        if hasattr(module, package.function):  # other versions may lack it
            yield package.kernel_of(getattr(module, package.function))


def is_right(
    kernel: PagedKernel, cache: PagedKVCache, num_heads: int, sliding_window: int | None = None
) -> bool:
    """Whether a kernel gives what it should, on the block of the cache that belongs to no sequence."""
    block, size = cache.dummy_block, cache.block_size
    randn = partial(torch.randn, dtype=cache.dtype, device=cache.device)
    query_BND = randn(1, num_heads, cache.head_dim)
    key_value_XSD = randn(2 * cache.num_kv_heads, size, cache.head_dim)
    cache.write(0, cache.integers(range(block * size, (block + 1) * size)), key_value_XSD)
    length_B = torch.tensor([size - 1], dtype=torch.int32, device=cache.device)
    block_BC = torch.tensor([[block]], dtype=torch.int32, device=cache.device)
    key_BKLD, value_BKLD = key_value_XSD.unsqueeze(0).chunk(2, dim=1)
    for window in {None, sliding_window}:
        mask = decode_mask(length_B.view(-1, 1, 1, 1), size, window, query_BND)
        expected = attend_rows(query_BND, key_BKLD, value_BKLD, mask, 1.0)
        try:
            found = kernel(query_BND, *cache.pages(0), length_B, block_BC, scaling=1.0, sliding_window=window)
        except Exception as error:  # some compile themselves, and lack a compiler
            logger.warning("an attention kernel is installed, but fails: %s", error, exc_info=True)
            return False
        if not torch.allclose(found, expected, rtol=0, atol=_TOLERANCE):
            logger.warning("an attention kernel is installed, but gives other numbers than it should")
            return False
    return True
