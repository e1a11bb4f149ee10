"""Keys and values of all sequences of one stage, in blocks.

Which block belongs to which sequence is decided elsewhere, in whole numbers; here are only tensors.

Shape letters: T tokens of the flat row, X heads of keys and as many of values together, D head size, S slots
of a pool (blocks times block size).
"""

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class PagedKVCache:
    """One pool a layer, [X, S, D], the keys' heads before the values'.

    Head-major, so that gathering blocks copies long runs; keys and values together, so that it is one copy.
    Memory is taken from the machine when a block is first written, not before (CPU).
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.num_layers = num_layers
        self.num_slots = num_blocks * block_size
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = device
        num_heads = 2 * num_kv_heads
        self.dummy_block = num_blocks
        """One more, which belongs to no sequence: rows that only fill up a batch write there."""
        pools = self.zeros((num_layers, num_heads, (num_blocks + 1) * block_size, head_dim))
        self._by_slot = pools.unbind()
        self._by_block = pools.view(num_layers, num_heads, num_blocks + 1, block_size * head_dim).unbind()

    def write(self, layer: int, slots_T: Tensor, key_value_XTD: Tensor) -> None:
        """Store T tokens of one layer at `slots_T` (int64)."""
        self._by_slot[layer].index_copy_(1, slots_T, key_value_XTD)

    def gather(self, layer: int, blocks: Tensor) -> Tensor:
        """A copy of the keys and values of `blocks` (int64, flat) in that order, [X, tokens, D]."""
        return self._by_block[layer].index_select(1, blocks).view(2 * self.num_kv_heads, -1, self.head_dim)

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and the values of one layer where they are, each [blocks, block size, heads, D]."""
        num_heads = self.num_kv_heads
        by_head = self._by_slot[layer].view(2, num_heads, -1, self.block_size, self.head_dim)
        keys, values = by_head.permute(0, 2, 3, 1, 4).unbind()
        return keys, values

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Other room for keys and values."""
        return _lazy_zeros(shape, self.dtype, self.device)

    def integers(self, numbers: Sequence[int]) -> Tensor:
        """A tensor [numbers] int64 where the cache is."""
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Zeros, as unwritten slots are read (and masked after); on the CPU untouched pages cost no memory."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(
            mmap.MADV_HUGEPAGE
        )  # gathers of scattered blocks spend a fifth of their time on page look-ups
    return torch.frombuffer(pages, dtype=dtype).view(shape)
