"""FlashAttention's functions as they are documented, computed plainly: for machines that have no such kernel.

The signatures are those of Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py (2),
hopper/flash_attn_interface.py (3) and flash_attn/cute/interface.py (4, commit 0251105), and of `varlen_attn`
in torch 2.13.
"""

from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor

Window = tuple[int, int]


def attend(
    query_LND: Tensor, key_CKD: Tensor, value_CKD: Tensor, scale: float, *, causal: bool, window: Window
) -> Tensor:
    """Rows at the end of the context; a query sees `window[0]` keys before it and `window[1]` behind it."""
    num_queries, num_heads, _ = query_LND.shape
    groups = num_heads // key_CKD.size(1)
    key, value = (each.repeat_interleave(groups, dim=1).double() for each in (key_CKD, value_CKD))
    places = torch.arange(key.size(0))
    own = torch.arange(num_queries).unsqueeze(1) + key.size(0) - num_queries
    hidden = torch.zeros(num_queries, key.size(0), dtype=torch.bool)
    before, behind = window
    if before >= 0:
        hidden |= places < own - before
    if causal or behind >= 0:
        hidden |= places > own + max(behind, 0)
    scores = torch.einsum("lnd,cnd->nlc", query_LND.double(), key) * scale
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("nlc,cnd->lnd", weights, value).to(query_LND.dtype)


def _paged(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, table: Tensor, scale: float, **how: object
) -> Tensor:
    assert k_cache.stride(-1) == 1
    assert v_cache.stride(-1) == 1
    assert table.dtype == lengths.dtype == torch.int32
    rows = []
    for query, length, blocks in zip(q, lengths.tolist(), table.tolist(), strict=True):
        key, value = (pool[blocks].flatten(0, 1)[:length] for pool in (k_cache, v_cache))
        rows.append(attend(query, key, value, scale, **how))  # type: ignore[arg-type]
    return torch.stack(rows)


def flash_2_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: None = None,
    v: None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: None = None,
    cache_leftpad: None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    assert k_cache.size(1) % 256 == 0, "page_block_size must be a multiple of 256"
    assert cache_seqlens is not None
    assert block_table is not None
    assert softmax_scale is not None
    return _paged(
        q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale, causal=causal, window=window_size
    )


def flash_3_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: None = None,
    v: None = None,
    qv: None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: None = None,
    cache_leftpad: None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: None = None,
    cu_seqlens_k_new: None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: None = None,
    num_splits: int = 0,
    pack_gqa: None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    assert cache_seqlens is not None
    assert page_table is not None
    assert softmax_scale is not None
    return _paged(
        q, k_cache, v_cache, cache_seqlens, page_table, softmax_scale, causal=causal, window=window_size
    )


def flash_4_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: None = None,
    cu_seqlens_q: None = None,
    cu_seqlens_k: None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: None = None,
    score_mod_bwd: None = None,
    mask_mod: None = None,
    block_sparse_tensors: None = None,
    aux_tensors: None = None,
    aux_scalars: None = None,
    return_lse: bool = False,
    scheduler_metadata: None = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
) -> tuple[Tensor, None]:
    assert seqused_k is not None
    assert page_table is not None
    assert softmax_scale is not None
    before, behind = window_size
    window = (-1 if before is None else before, -1 if behind is None else behind)
    return _paged(q, k, v, seqused_k, page_table, softmax_scale, causal=causal, window=window), None


def _segments(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float, *, causal: bool, window: Window
) -> Tensor:
    assert ends.dtype == torch.int32
    bounds = ends.tolist()
    pieces = [slice(*each) for each in pairwise(bounds)]
    assert longest == max(each.stop - each.start for each in pieces)
    outputs = [attend(q[each], k[each], v[each], scale, causal=causal, window=window) for each in pieces]
    return torch.cat(outputs)


def flash_2_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: None = None,
) -> Tensor:
    assert softmax_scale is not None
    return _segments(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal=causal, window=window_size)


def torch_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: Window = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: None = None,
    block_table: None = None,
    num_splits: int | None = None,
) -> Tensor:
    assert scale is not None
    assert enable_gqa or query.size(1) == key.size(1)
    return _segments(query, key, value, cu_seq_q, max_q, scale, causal=False, window=window_size)


FLASH_2 = SimpleNamespace(
    flash_attn_with_kvcache=flash_2_with_kvcache, flash_attn_varlen_func=flash_2_varlen_func
)
FLASH_3 = SimpleNamespace(flash_attn_with_kvcache=flash_3_with_kvcache)
FLASH_4 = SimpleNamespace(flash_attn_varlen_func=flash_4_varlen_func)
TORCH = SimpleNamespace(varlen_attn=torch_varlen_attn)
