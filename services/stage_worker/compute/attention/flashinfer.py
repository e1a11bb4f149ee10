"""FlashInfer's decoding as a kernel that reads blocks in place.

Its wrappers with `plan` want each step's lengths on the host, which a captured step does not have. This
function takes them where they are; it runs XQA on Hopper and TensorRT-LLM's kernels on Blackwell.

Shape letters: those of `kernels`.
"""

from collections.abc import Callable
from functools import cache
from typing import Final

import torch
from torch import Tensor

_WORKSPACE_BYTES: Final = 256 * 2**20
"""As much as its own tests give it."""


class FlashInferKernel:
    """Implements `PagedKernel` by FlashInfer."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        """`attend`: `trtllm_batch_decode_with_kv_cache` of `flashinfer.decode`."""
        self._attend = attend

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
        return self._attend(
            query_BND.contiguous(),
            (key_PSKD.transpose(1, 2), value_PSKD.transpose(1, 2)),
            _workspace(query_BND.device),
            block_BC.contiguous(),
            length_B,
            block_BC.size(1) * key_PSKD.size(1),
            bmm1_scale=scaling,
            window_left=-1 if sliding_window is None else sliding_window - 1,
            kv_layout="HND",
        )


@cache
def _workspace(device: torch.device) -> Tensor:
    """Zeros at first use, as it wants them; iterations of one device follow each other, so they share it."""
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
