"""Keys and values of all sequences of one stage, in blocks; and attention over them for one iteration.

Which block belongs to which sequence is decided elsewhere, in whole numbers; here are only tensors.

Shape letters: T tokens of the flat row, N query heads, K key and value heads, D head size, B decode rows,
L tokens of context (a whole number of blocks), S slots of a pool (blocks times block size).
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from shared.model.attention import causal_attention


class PagedKVCache:
    """Two pools a layer, keys and values, each [K, S, D]: head-major, so that blocks are copied in long runs.

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
        self.block_size = block_size
        shape = (num_layers, num_kv_heads, num_blocks * block_size, head_dim)
        self.keys = _lazy_zeros(shape, dtype, device).unbind()
        self.values = _lazy_zeros(shape, dtype, device).unbind()
        self.dtype = dtype
        self.device = device

    def write(self, layer: int, slots_T: Tensor, key_KTD: Tensor, value_KTD: Tensor) -> None:
        """Store T tokens of one layer at `slots_T` (int64)."""
        self.keys[layer].index_copy_(1, slots_T, key_KTD)
        self.values[layer].index_copy_(1, slots_T, value_KTD)

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of `blocks` (int64, flat) in that order, each [K, tokens, D]."""
        return self._gather(self.keys[layer], blocks), self._gather(self.values[layer], blocks)

    def _gather(self, pool_KSD: Tensor, blocks: Tensor) -> Tensor:
        num_heads, _, head_dim = pool_KSD.shape
        by_block = pool_KSD.view(num_heads, -1, self.block_size * head_dim)
        return by_block.index_select(1, blocks).view(num_heads, -1, head_dim)


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


class Chunk(NamedTuple):
    """Tokens `start` to `start + num_tokens - 1` of one sequence, whose context is in `blocks`."""

    start: int
    num_tokens: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        """The sequence's length after this chunk."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class _Decodes:
    """All rows of one token each, attended to in one go."""

    rows: slice | Tensor
    """Their places in the flat row: a slice when they are neighbours."""
    num_rows: int
    blocks: Tensor
    """Each row's blocks, filled up to the longest row's count with its own first block; flat, int64."""
    ends_B111: Tensor


class PagedAttention:
    """The attention of one iteration (an `AttentionContext`): built from lists once, used by every layer.

    `chunks` stand in the order of the flat row. The cache's slots of all its tokens are written before any
    is read, so chunks may share blocks they do not write. For inference only: nothing here has gradients.
    """

    def __init__(self, cache: PagedKVCache, chunks: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        self._cache = cache
        self._chunks = [Chunk(*chunk) for chunk in chunks]
        ends = list(accumulate(chunk.num_tokens for chunk in self._chunks))
        self._rows = [
            slice(end - chunk.num_tokens, end) for chunk, end in zip(self._chunks, ends, strict=True)
        ]
        self._slots_T = self._integers(_slots(self._chunks, cache.block_size))
        self._decode_masks: dict[int | None, Tensor] = {}
        self._chunk_blocks = {
            number: self._integers(chunk.blocks[: ceil(chunk.end / cache.block_size)])
            for number, chunk in enumerate(self._chunks)
            if chunk.start > 0 and chunk.num_tokens > 1
        }

    def attend(
        self,
        layer: int,
        query_1NTD: Tensor,
        key_1KTD: Tensor,
        value_1KTD: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Keep the keys and values, and return the attention output; see `AttentionContext.attend`."""
        self._cache.write(layer, self._slots_T, key_1KTD[0], value_1KTD[0])
        decodes = self._decodes
        if decodes is not None and decodes.num_rows == query_1NTD.size(2):
            return self._attend_decodes(decodes, layer, query_1NTD[0], scaling, sliding_window).unsqueeze(0)
        output_1TND = torch.empty_like(query_1NTD.transpose(1, 2), memory_format=torch.contiguous_format)
        if decodes is not None:
            query_NBD = query_1NTD[0][:, decodes.rows]
            output_1TND[0, decodes.rows] = self._attend_decodes(
                decodes, layer, query_NBD, scaling, sliding_window
            )
        for number, (chunk, rows) in enumerate(zip(self._chunks, self._rows, strict=True)):
            if chunk.num_tokens > 1:
                key, value = self._context(layer, number, key_1KTD, value_1KTD)
                output = causal_attention(query_1NTD[:, :, rows], key, value, scaling, sliding_window)
                output_1TND[:, rows] = output.transpose(1, 2)
        return output_1TND

    def _context(
        self, layer: int, number: int, key_1KTD: Tensor, value_1KTD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a chunk of many tokens sees: its own keys and values when fresh, else all in the cache."""
        if number not in self._chunk_blocks:
            rows = self._rows[number]
            return key_1KTD[:, :, rows], value_1KTD[:, :, rows]
        key_KLD, value_KLD = self._cache.gather(layer, self._chunk_blocks[number])
        end = self._chunks[number].end
        return key_KLD[None, :, :end], value_KLD[None, :, :end]

    def _attend_decodes(
        self, decodes: _Decodes, layer: int, query_NBD: Tensor, scaling: float, sliding_window: int | None
    ) -> Tensor:
        """Attention output [B, N, D]; query heads of one key head go as if they were that many tokens."""
        key_KXD, value_KXD = self._cache.gather(layer, decodes.blocks)
        num_kv_heads, _, head_dim = key_KXD.shape
        num_rows = decodes.num_rows
        shape = (num_kv_heads, num_rows, -1, head_dim)
        output = scaled_dot_product_attention(
            query_NBD.transpose(0, 1).reshape(num_rows, num_kv_heads, -1, head_dim),
            key_KXD.view(shape).transpose(0, 1),
            value_KXD.view(shape).transpose(0, 1),
            attn_mask=self._decode_mask(sliding_window),
            scale=scaling,
        )
        return output.reshape(num_rows, -1, head_dim)

    @cached_property
    def _decodes(self) -> _Decodes | None:
        rows = [
            rows.start for chunk, rows in zip(self._chunks, self._rows, strict=True) if chunk.num_tokens == 1
        ]
        chunks = [chunk for chunk in self._chunks if chunk.num_tokens == 1]
        if not chunks:
            return None
        neighbours = rows[-1] - rows[0] + 1 == len(rows)
        num_blocks = ceil(max(chunk.end for chunk in chunks) / self._cache.block_size)
        blocks = [
            block
            for chunk in chunks
            for block in (*chunk.blocks[:num_blocks], *[chunk.blocks[0]] * (num_blocks - len(chunk.blocks)))
        ]
        return _Decodes(
            rows=slice(rows[0], rows[-1] + 1) if neighbours else self._integers(rows),
            num_rows=len(rows),
            blocks=self._integers(blocks),
            ends_B111=self._integers([chunk.end for chunk in chunks]).view(-1, 1, 1, 1),
        )

    def _decode_mask(self, sliding_window: int | None) -> Tensor:
        """Additive mask [B, 1, 1, L], made once for each window."""
        if sliding_window not in self._decode_masks:
            assert self._decodes is not None
            ends, num_rows = self._decodes.ends_B111, self._decodes.num_rows
            length = len(self._decodes.blocks) // num_rows * self._cache.block_size
            places = torch.arange(length, device=self._cache.device)
            hidden = places >= ends
            if sliding_window is not None:
                hidden |= places < ends - sliding_window
            mask = torch.zeros(hidden.shape, dtype=self._cache.dtype, device=self._cache.device)
            self._decode_masks[sliding_window] = mask.masked_fill_(hidden, float("-inf"))
        return self._decode_masks[sliding_window]

    def _integers(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._cache.device)


def _slots(chunks: Sequence[Chunk], block_size: int) -> list[int]:
    return [
        chunk.blocks[place // block_size] * block_size + place % block_size
        for chunk in chunks
        for place in range(chunk.start, chunk.end)
    ]
