"""Keys and values of all sequences of one stage, in blocks; and attention over them for one iteration.

Which block belongs to which sequence is decided elsewhere, in whole numbers; here are only tensors.

Shape letters: T tokens of the flat row, N query heads, K heads of keys and as many of values, X = 2K of both,
D head size, B decode rows, L tokens of context (whole blocks), S slots of a pool (blocks times block size).
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
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = device
        num_heads, num_slots = 2 * num_kv_heads, num_blocks * block_size
        pools = _lazy_zeros((num_layers, num_heads, num_slots, head_dim), dtype, device)
        self._by_slot = pools.unbind()
        self._by_block = pools.view(num_layers, num_heads, num_blocks, block_size * head_dim).unbind()

    def write(self, layer: int, slots_T: Tensor, key_value_XTD: Tensor) -> None:
        """Store T tokens of one layer at `slots_T` (int64)."""
        self._by_slot[layer].index_copy_(1, slots_T, key_value_XTD)

    def clear(self, layer: int, slots: Tensor) -> None:
        """Put zeros at `slots` (int64): what an earlier sequence left there may be no number."""
        self._by_slot[layer].index_fill_(1, slots, 0.0)

    def gather(self, layer: int, blocks: Tensor) -> Tensor:
        """A copy of the keys and values of `blocks` (int64, flat) in that order, [X, tokens, D]."""
        return self._by_block[layer].index_select(1, blocks).view(2 * self.num_kv_heads, -1, self.head_dim)


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
        self._tails = self._integers(_tails(self._chunks, cache.block_size))
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
        key_value_XTD = torch.cat((key_1KTD[0], value_1KTD[0]))
        return self.attend_joined(
            layer,
            query_1NTD[0].transpose(0, 1),
            key_value_XTD.transpose(0, 1),
            scaling=scaling,
            sliding_window=sliding_window,
        )

    def attend_joined(
        self,
        layer: int,
        query_TND: Tensor,
        key_value_TXD: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        """The same with keys and values in one tensor, first the heads of the keys; returns [1, T, N, D]."""
        self._cache.write(layer, self._slots_T, key_value_TXD.transpose(0, 1))
        if len(self._tails):
            self._cache.clear(layer, self._tails)
        decodes = self._decodes
        if decodes is not None and decodes.num_rows == len(query_TND):
            return self._attend_decodes(decodes, layer, query_TND, scaling, sliding_window).unsqueeze(0)
        output_TND = torch.empty(query_TND.shape, dtype=query_TND.dtype, device=query_TND.device)
        if decodes is not None:
            query_BND = query_TND[decodes.rows]
            output_TND[decodes.rows] = self._attend_decodes(
                decodes, layer, query_BND, scaling, sliding_window
            )
        for number, (chunk, rows) in enumerate(zip(self._chunks, self._rows, strict=True)):
            if chunk.num_tokens > 1:
                key, value = self._context(layer, number, key_value_TXD).unsqueeze(0).chunk(2, 1)
                query_1NLD = query_TND[rows].transpose(0, 1).unsqueeze(0)
                output_1NLD = causal_attention(query_1NLD, key, value, scaling, sliding_window)
                output_TND[rows] = output_1NLD[0].transpose(0, 1)
        return output_TND.unsqueeze(0)

    def _context(self, layer: int, number: int, key_value_TXD: Tensor) -> Tensor:
        """A chunk's whole context, [X, tokens, D]: its own rows when fresh, else those of the cache."""
        if number not in self._chunk_blocks:
            return key_value_TXD[self._rows[number]].transpose(0, 1)
        return self._cache.gather(layer, self._chunk_blocks[number])[:, : self._chunks[number].end]

    def _attend_decodes(
        self, decodes: _Decodes, layer: int, query_BND: Tensor, scaling: float, sliding_window: int | None
    ) -> Tensor:
        """Attention output [B, N, D]; query heads of one key head go as if they were that many tokens."""
        num_rows, num_kv_heads, head_dim = decodes.num_rows, self._cache.num_kv_heads, self._cache.head_dim
        gathered = self._cache.gather(layer, decodes.blocks).view(2, num_kv_heads, num_rows, -1, head_dim)
        key_BKLD, value_BKLD = gathered.transpose(1, 2).unbind()
        output = scaled_dot_product_attention(
            query_BND.reshape(num_rows, num_kv_heads, -1, head_dim),
            key_BKLD,
            value_BKLD,
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
        blocks = [block for chunk in chunks for block in self._filled_up(chunk, num_blocks)]
        return _Decodes(
            rows=slice(rows[0], rows[-1] + 1) if neighbours else self._integers(rows),
            num_rows=len(rows),
            blocks=self._integers(blocks),
            ends_B111=self._integers([chunk.end for chunk in chunks]).view(-1, 1, 1, 1),
        )

    def _filled_up(self, chunk: Chunk, num_blocks: int) -> list[int]:
        """The blocks that hold the chunk's context, and no others: a mask does not hide what is no number."""
        own = chunk.blocks[: ceil(chunk.end / self._cache.block_size)]
        return [*own, *[chunk.blocks[0]] * (num_blocks - len(own))]

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


def _tails(chunks: Sequence[Chunk], block_size: int) -> list[int]:
    """Slots behind the chunks' ends, in blocks that the chunks are the first to write.

    Whole blocks are read, and a mask adds to what it hides: it takes no NaN away.
    """
    return [
        chunk.blocks[place // block_size] * block_size + place % block_size
        for chunk in chunks
        if chunk.start <= (chunk.end - 1) // block_size * block_size
        for place in range(chunk.end, ceil(chunk.end / block_size) * block_size)
    ]
