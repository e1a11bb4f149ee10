"""The mask of rows of one token."""

from torch import Tensor, arange, zeros


def decode_mask(ends_B111: Tensor, length: int, sliding_window: int | None, like: Tensor) -> Tensor:
    """Additive mask [B, 1, 1, length] for the last token of each row, in the dtype of `like`."""
    places = arange(length, device=ends_B111.device)
    hidden = places >= ends_B111
    if sliding_window is not None:
        hidden |= places < ends_B111 - sliding_window
    mask = zeros(hidden.shape, dtype=like.dtype, device=ends_B111.device)
    return mask.masked_fill_(hidden, float("-inf"))
