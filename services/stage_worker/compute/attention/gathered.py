"""Decode rows over a copy of their blocks, made for each layer: works everywhere, and depends on nothing.

Shape letters: B decode rows, N query heads, K heads of keys, X = 2K of keys and values, D head size.
"""

from collections.abc import Sequence
from math import ceil

from torch import Tensor

from services.stage_worker.compute.attention.chunks import Chunk
from services.stage_worker.compute.attention.decode import decode_chunks
from services.stage_worker.compute.attention.rows import attend_rows, decode_mask
from services.stage_worker.compute.kv_cache import PagedKVCache


class GatheredDecoder:
    """Implements `Decoder`."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache = cache

    def begin(self, chunks: Sequence[Chunk]) -> "GatheredDecodes":
        """See `Decoder.begin`."""
        return GatheredDecodes(self._cache, decode_chunks(chunks))


class GatheredDecodes:
    """Implements `DecodeAttention`."""

    def __init__(self, cache: PagedKVCache, chunks: Sequence[Chunk]) -> None:
        self._cache = cache
        self._num_rows = len(chunks)
        num_blocks = max((ceil(chunk.end / cache.block_size) for chunk in chunks), default=0)
        self._length = num_blocks * cache.block_size
        self._blocks = cache.integers([b for chunk in chunks for b in self._filled_up(chunk, num_blocks)])
        self._tails = cache.integers(self._places_behind_ends(chunks))
        self._ends_B111 = cache.integers([chunk.end for chunk in chunks]).view(-1, 1, 1, 1)
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self,
        layer: int,
        query_BND: Tensor,
        key_value_BXD: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        """See `DecodeAttention.attend`."""
        num_rows, num_kv_heads, head_dim = self._num_rows, self._cache.num_kv_heads, self._cache.head_dim
        gathered = self._cache.gather(layer, self._blocks).index_fill_(1, self._tails, 0.0)
        key, value = gathered.view(2, num_kv_heads, num_rows, -1, head_dim).transpose(1, 2).unbind()
        if sliding_window not in self._masks:
            self._masks[sliding_window] = decode_mask(self._ends_B111, self._length, sliding_window, key)
        return attend_rows(query_BND, key, value, self._masks[sliding_window], scaling)

    def _filled_up(self, chunk: Chunk, num_blocks: int) -> list[int]:
        """The blocks that hold the chunk's context, then its first one again and again."""
        own = chunk.blocks_of(chunk.end, self._cache.block_size)
        return [*own, *[own[0]] * (num_blocks - len(own))]

    def _places_behind_ends(self, chunks: Sequence[Chunk]) -> list[int]:
        """Places among the gathered tokens that an earlier sequence has left: a mask takes no NaN away.

        The last block of each row has them, and its first one where that is the last, again and again.
        """
        block_size, places = self._cache.block_size, list[int]()
        for row, chunk in enumerate(chunks):
            first = row * self._length
            stop = self._length if chunk.end < block_size else ceil(chunk.end / block_size) * block_size
            places.extend(range(first + chunk.end, first + stop))
        return places
