"""FlashInfer's decoding as it is documented, computed plainly: for machines that have no such kernel.

The signature is that of flashinfer-ai/flashinfer, flashinfer/decode.py (commit fb28d72).
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from tests.support.flash_attention import attend


def trtllm_batch_decode_with_kv_cache(
    query: Tensor,
    kv_cache: tuple[Tensor, Tensor],
    workspace_buffer: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    bmm1_scale: float = 1.0,
    bmm2_scale: float = 1.0,
    window_left: int = -1,
    out: None = None,
    out_dtype: None = None,
    o_sf_scale: None = None,
    o_sf_vec_size: None = None,
    sinks: None = None,
    kv_layout: str = "HND",
    enable_pdl: bool | None = None,
    backend: str = "auto",
    q_len_per_req: int | None = 1,
    o_scale: float | None = 1.0,
    mask: None = None,
    max_q_len: None = None,
    cum_seq_lens_q: None = None,
) -> Tensor:
    """Query [B, N, D]; keys and values [P, K, S, D] each, as the layout HND has them."""
    assert kv_layout == "HND"
    assert query.is_contiguous()
    assert block_tables.is_contiguous()
    assert block_tables.dtype == seq_lens.dtype == torch.int32
    assert max_seq_len >= int(seq_lens.max())
    assert torch.count_nonzero(workspace_buffer[: 8 * 2**20]) == 0, "its semaphores begin with zeros"
    keys, values = kv_cache
    assert keys.stride() == values.stride()
    assert keys.stride(-1) == 1
    rows = []
    for row, length, blocks in zip(query, seq_lens.tolist(), block_tables.tolist(), strict=True):
        key, value = (pool[blocks].transpose(1, 2).flatten(0, 1)[:length] for pool in (keys, values))
        rows.append(attend(row.unsqueeze(0), key, value, bmm1_scale, causal=True, window=(window_left, 0)))
    return torch.cat(rows) * bmm2_scale


FLASHINFER = SimpleNamespace(trtllm_batch_decode_with_kv_cache=trtllm_batch_decode_with_kv_cache)
