"""Decode rows over the blocks in a table: fixed shapes, so the launches are always the same.

A kernel reads the blocks in place where there is one; else they are copied for each layer.

Shape letters: T tokens of the flat row, R rows (as many), C blocks of context of each, L their tokens,
N query heads, K heads of keys, X = 2K of keys and values, D head size.
"""

import torch
from torch import Tensor

from services.stage_worker.compute.attention.kernels import PagedKernel
from services.stage_worker.compute.attention.rows import attend_rows, decode_mask
from services.stage_worker.compute.kv_cache import PagedKVCache


class StaticAttention:
    """Attention of one step (an `AttentionContext`) over the blocks in a table [R, C]."""

    def __init__(
        self,
        cache: PagedKVCache,
        slot_R: Tensor,
        length_R: Tensor,
        block_RC: Tensor,
        kernel: PagedKernel | None = None,
    ) -> None:
        self._cache = cache
        self._kernel = kernel
        self._table = block_RC.contiguous(), length_R.int()
        self._slot_R = slot_R
        self._length_R111 = length_R.view(-1, 1, 1, 1)
        self._blocks = block_RC.flatten()
        self._num_rows = block_RC.size(0)
        self._num_tokens = block_RC.size(1) * cache.block_size
        places_L = torch.arange(self._num_tokens, device=block_RC.device)
        self._is_behind_RL1 = (places_L >= length_R.unsqueeze(1)).unsqueeze(2)
        self._masks: dict[int | None, Tensor] = {}

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
        """See `AttentionContext.attend`."""
        key_value_XTD = torch.cat((key_1KTD[0], value_1KTD[0]))
        query_TND, key_value_TXD = query_1NTD[0].transpose(0, 1), key_value_XTD.transpose(0, 1)
        return self.attend_joined(
            layer, query_TND, key_value_TXD, scaling=scaling, sliding_window=sliding_window
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
        self._cache.write(layer, self._slot_R, key_value_TXD.transpose(0, 1))
        if self._kernel is None:
            return self._over_copies(layer, query_TND, scaling, sliding_window).unsqueeze(0)
        block_RC, length_R = self._table
        output_TND = self._kernel(
            query_TND,
            *self._cache.pages(layer),
            length_R,
            block_RC,
            scaling=scaling,
            sliding_window=sliding_window,
        )
        return output_TND.unsqueeze(0)

    def _over_copies(
        self, layer: int, query_TND: Tensor, scaling: float, sliding_window: int | None
    ) -> Tensor:
        """Attend over copies, with zeros behind each row's end: a mask takes no NaN away."""
        cache, num_rows = self._cache, self._num_rows
        gathered = cache.gather(layer, self._blocks)
        gathered_XRLD = gathered.view(len(gathered), num_rows, -1, cache.head_dim)
        gathered_XRLD.masked_fill_(self._is_behind_RL1, 0.0)
        both_2KRLD = gathered_XRLD.view(2, cache.num_kv_heads, *gathered_XRLD.shape[1:])
        key, value = both_2KRLD.transpose(1, 2).unbind()
        if sliding_window not in self._masks:
            self._masks[sliding_window] = decode_mask(
                self._length_R111, self._num_tokens, sliding_window, key
            )
        return attend_rows(query_TND, key, value, self._masks[sliding_window], scaling)
