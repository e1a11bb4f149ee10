"""Attention of rows of one token over contexts that lie side by side, and its mask.

Shape letters: B rows, N query heads, K heads of keys, L tokens of context, D head size.
"""

from torch import Tensor, arange, zeros
from torch.nn.functional import scaled_dot_product_attention


def decode_mask(ends_B111: Tensor, length: int, sliding_window: int | None, like: Tensor) -> Tensor:
    """Additive mask [B, 1, 1, length] for the last token of each row, in the dtype of `like`."""
    places = arange(length, device=ends_B111.device)
    hidden = places >= ends_B111
    if sliding_window is not None:
        hidden |= places < ends_B111 - sliding_window
    mask = zeros(hidden.shape, dtype=like.dtype, device=ends_B111.device)
    return mask.masked_fill_(hidden, float("-inf"))


def attend_rows(
    query_BND: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, mask_B11L: Tensor, scaling: float
) -> Tensor:
    """Attention output [B, N, D]; query heads of one key head go as if they were that many tokens."""
    num_rows, num_heads, head_dim = query_BND.shape
    output = scaled_dot_product_attention(
        query_BND.reshape(num_rows, key_BKLD.size(1), -1, head_dim),
        key_BKLD,
        value_BKLD,
        attn_mask=mask_B11L,
        scale=scaling,
    )
    return output.reshape(num_rows, num_heads, head_dim)
