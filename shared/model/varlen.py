"""Attention of packed segments in one launch, where torch or a package can do that.

Shape letters: T tokens of the flat row, N query heads, K heads of keys and values, D head size, S segments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor

_HALF: Final = (torch.bfloat16, torch.float16)
_HEAD_DIM_STEP: Final = 8
_MAX_HEAD_DIM: Final = 256
_NEEDED: Final = {"scale", "window_size", "enable_gqa"}
"""Parameters that torch's function must have: older ones lack some of them."""


@dataclass(frozen=True, slots=True)
class Varlen:
    """Causal attention within each segment; differentiable."""

    attend: Callable[..., Tensor]
    """`torch.nn.attention.varlen.varlen_attn`, or `flash_attn_varlen_func` of FlashAttention."""
    is_torch: bool

    def __call__(
        self,
        query_TND: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        ends: Tensor,
        longest: int,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        """The output [T, N, D]. `ends` [S + 1]: the segments' ends, from 0 on, int32; `longest` in tokens."""
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        options: dict[str, Any] = {"softmax_scale": scaling, "causal": True}
        if self.is_torch:
            options = {"scale": scaling, "enable_gqa": query_TND.size(1) != key_TKD.size(1)}
        return self.attend(
            query_TND, key_TKD, value_TKD, ends, ends, longest, longest, window_size=window, **options
        )


def varlen_for(like: Tensor) -> Varlen | None:
    """The way for heads of this device, dtype and size; None: segments run one after the other."""
    if not like.is_cuda or like.dtype not in _HALF:
        return None
    head_dim = like.size(-1)
    return installed_varlen() if head_dim % _HEAD_DIM_STEP == 0 and head_dim <= _MAX_HEAD_DIM else None


@cache
def installed_varlen(load: Callable[[str], Any] = import_module) -> Varlen | None:
    """Torch's own, else FlashAttention's; `load` imports a module by its name."""
    try:
        attend = load("torch.nn.attention.varlen").varlen_attn
        if signature(attend).parameters.keys() >= _NEEDED:
            return Varlen(attend, is_torch=True)
    except ImportError:
        pass  # torch is older
    try:
        return Varlen(load("flash_attn").flash_attn_varlen_func, is_torch=False)
    except (ImportError, AttributeError):  # FlashAttention 4 alone leaves a package of that name without it
        return None
