"""FlashAttention's functions as kernels that read blocks in place: versions 2 and 3, and version 4.

Shape letters: those of `kernels`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class FlashKernel:
    """Implements `PagedKernel` by FlashAttention 2 or 3."""

    attend: Callable[..., Tensor]
    """`flash_attn_with_kvcache`."""
    table_name: str
    """How it calls the table of blocks."""

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
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        table: dict[str, Any] = {self.table_name: block_BC}
        output_B1ND = self.attend(
            query_BND.unsqueeze(1),
            key_PSKD,
            value_PSKD,
            cache_seqlens=length_B,
            softmax_scale=scaling,
            causal=True,
            window_size=window,
            **table,
        )
        return output_B1ND.squeeze(1)


@dataclass(frozen=True, slots=True)
class Flash4Kernel:
    """Implements `PagedKernel` by FlashAttention 4."""

    attend: Callable[..., tuple[Tensor, Tensor | None]]
    """`flash_attn_varlen_func` of `flash_attn.cute`."""

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
        output_B1ND, _ = self.attend(
            query_BND.unsqueeze(1),
            key_PSKD,
            value_PSKD,
            seqused_k=length_B,
            page_table=block_BC,
            softmax_scale=scaling,
            causal=True,
            window_size=(None if sliding_window is None else sliding_window - 1, None),
        )
        return output_B1ND.squeeze(1)
