"""A float32 copy of many tensors in one piece, as collectives want them."""

from collections.abc import Mapping

import torch
from torch import Tensor


class FlatTensors:
    """Room for the copy: allocated once, filled again and again."""

    def __init__(self, like: Mapping[str, Tensor], device: torch.device) -> None:
        """Only names and shapes of `like` matter; it may be on `meta`."""
        sizes = [tensor.numel() for tensor in like.values()]
        self.flat = torch.zeros(sum(sizes), device=device)
        """[N]: all elements, tensor after tensor."""
        parts = zip(like.items(), torch.split(self.flat, sizes), strict=True)
        self.views = {name: part.view(tensor.shape) for (name, tensor), part in parts}
        """Each tensor's part of `flat`, in its shape."""

    @torch.no_grad()
    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a copy of `tensors`; other dtypes become float32."""
        for name, view in self.views.items():
            _copy(view, tensors[name])

    @torch.no_grad()
    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite `tensors`, rounded to their own dtype."""
        for name, view in self.views.items():
            _copy(tensors[name], view)


def _copy(to: Tensor, source: Tensor) -> None:
    assert to.shape == source.shape, (to.shape, source.shape)  # copy_ would broadcast
    to.copy_(source)
