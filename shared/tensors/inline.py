"""Carrier `inline`: the bytes travel in the message. For small tensors, and when nothing else works."""

import torch
from torch import Tensor

from shared.tensors.ref import TensorRef

CARRIER = "inline"


def put(tensor: Tensor) -> TensorRef:
    """Copy `tensor` into a reference that holds its bytes."""
    flat = tensor.detach().to("cpu").contiguous()
    data = flat.view(-1).view(torch.uint8).numpy().tobytes()
    return TensorRef(
        carrier=CARRIER, shape=tuple(tensor.shape), dtype=dtype_name(tensor), size_bytes=len(data), data=data
    )


def take(ref: TensorRef) -> Tensor:
    """A private CPU tensor with what `ref` holds."""
    flat = torch.frombuffer(bytearray(ref.data), dtype=dtype_of(ref))
    return flat.view(ref.shape)


def dtype_name(tensor: Tensor) -> str:
    """`float32` for torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")


def dtype_of(ref: TensorRef) -> torch.dtype:
    """The torch dtype that `ref` names."""
    dtype = getattr(torch, ref.dtype)
    assert isinstance(dtype, torch.dtype), ref.dtype
    return dtype
