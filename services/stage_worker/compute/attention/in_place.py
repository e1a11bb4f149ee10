"""Decode rows over their blocks where they are, by a kernel that an installed package has.

Shape letters: B decode rows, N query heads, X heads of keys and values together, D head size.
"""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from services.stage_worker.compute.attention.chunks import Chunk
from services.stage_worker.compute.attention.decode import decode_chunks
from services.stage_worker.compute.attention.kernels import PagedKernel
from services.stage_worker.compute.kv_cache import PagedKVCache


class InPlaceDecoder:
    """Implements `Decoder`."""

    def __init__(self, cache: PagedKVCache, kernel: PagedKernel) -> None:
        self._cache = cache
        self._kernel = kernel

    def begin(self, chunks: Sequence[Chunk]) -> "InPlaceDecodes":
        """See `Decoder.begin`."""
        return InPlaceDecodes(self._cache, self._kernel, decode_chunks(chunks))


class InPlaceDecodes:
    """Implements `DecodeAttention`."""

    def __init__(self, cache: PagedKVCache, kernel: PagedKernel, chunks: Sequence[Chunk]) -> None:
        self._cache = cache
        self._kernel = kernel
        size = cache.block_size
        num_blocks = max((ceil(chunk.end / size) for chunk in chunks), default=0)
        rows = [chunk.blocks_of(chunk.end, size) for chunk in chunks]
        table = [[*row, *[cache.dummy_block] * (num_blocks - len(row))] for row in rows]
        self._block_BC = torch.tensor(table, dtype=torch.int32, device=cache.device)
        self._length_B = torch.tensor([chunk.end for chunk in chunks], dtype=torch.int32, device=cache.device)

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
        return self._kernel(
            query_BND,
            *self._cache.pages(layer),
            self._length_B,
            self._block_BC,
            scaling=scaling,
            sliding_window=sliding_window,
        )
