"""Attention of one iteration over the paged cache: decode rows in one go, then each chunk of a prompt.

Shape letters: T tokens of the flat row, N query heads, K heads of keys and as many of values, X = 2K of both,
D head size, B decode rows, L tokens of a chunk.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from services.stage_worker.compute.attention.chunks import Chunk, slots_of
from services.stage_worker.compute.attention.decode import Decoder
from services.stage_worker.compute.attention.gathered import GatheredDecoder
from services.stage_worker.compute.kv_cache import PagedKVCache
from shared.model.attention import CausalMasks, causal_attention


class PagedAttention:
    """The attention of one iteration (an `AttentionContext`): built from lists once, used by every layer.

    `chunks` stand in the order of the flat row. The cache's slots of all its tokens are written before any
    is read, so chunks may share blocks they do not write. For inference only: nothing here has gradients.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        chunks: Sequence[tuple[int, int, Sequence[int]]],
        decoder: Decoder | None = None,
    ) -> None:
        """`decoder`: how decode rows attend; None: over gathered blocks."""
        self._cache = cache
        pieces = [Chunk(*chunk) for chunk in chunks]
        ends = list(accumulate(piece.num_tokens for piece in pieces))
        self._slots_T = cache.integers(slots_of(pieces, cache.block_size))
        self._decodes = (decoder or GatheredDecoder(cache)).begin(pieces)
        self._decode_rows = _neighbours(
            [end - 1 for piece, end in zip(pieces, ends, strict=True) if piece.num_tokens == 1]
        )
        self._prompts = [
            (piece, slice(end - piece.num_tokens, end), self._blocks(piece))
            for piece, end in zip(pieces, ends, strict=True)
            if piece.num_tokens > 1
        ]
        self._masks = CausalMasks()

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
        if not self._prompts:
            output_TND = self._decodes.attend(
                layer, query_TND, key_value_TXD, scaling=scaling, sliding_window=sliding_window
            )
            return output_TND.unsqueeze(0)
        output_TND = torch.empty(query_TND.shape, dtype=query_TND.dtype, device=query_TND.device)
        if (rows := self._decode_rows) is not None:
            output_TND[rows] = self._decodes.attend(
                layer, query_TND[rows], key_value_TXD[rows], scaling=scaling, sliding_window=sliding_window
            )
        for chunk, tokens, blocks in self._prompts:
            query_NLD, own_XLD = query_TND[tokens].transpose(0, 1), key_value_TXD[tokens].transpose(0, 1)
            context_XCD = own_XLD if blocks is None else self._cache.gather(layer, blocks)[:, : chunk.end]
            key, value = context_XCD.unsqueeze(0).chunk(2, 1)
            output_1NLD = causal_attention(
                query_NLD.unsqueeze(0), key, value, scaling, sliding_window, self._masks
            )
            output_TND[tokens] = output_1NLD[0].transpose(0, 1)
        return output_TND.unsqueeze(0)

    def _blocks(self, chunk: Chunk) -> Tensor | None:
        """The blocks of a chunk's context; None where its own tokens are all of it."""
        return (
            self._cache.integers(chunk.blocks_of(chunk.end, self._cache.block_size)) if chunk.start else None
        )


def _neighbours(rows: Sequence[int]) -> slice | list[int] | None:
    """The rows as a slice where they are neighbours; None where there are none."""
    if not rows:
        return None
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else list(rows)
