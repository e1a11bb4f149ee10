"""Carrier `inline`: the bytes travel in the message. For small tensors, and when nothing else works."""

from math import prod
from typing import cast

import torch
from torch import Tensor

from shared.errors import CarrierError
from shared.tensors.ref import DtypeName, TensorRef

CARRIER = "inline"


def put(tensor: Tensor) -> TensorRef:
    """Copy `tensor` into a reference that holds its bytes."""
    flat = tensor.detach().to("cpu").contiguous()
    data = flat.view(-1).view(torch.uint8).numpy().tobytes()
    return TensorRef(
        carrier=CARRIER, shape=tuple(tensor.shape), dtype=dtype_name(tensor), size_bytes=len(data), data=data
    )


def take(ref: TensorRef) -> Tensor:
    """A private CPU tensor with what `ref` holds. Raises CarrierError when it contradicts itself."""
    check_size(ref)
    if len(ref.data) != ref.size_bytes:
        raise CarrierError(f"{len(ref.data)} bytes came of {ref.size_bytes}")
    if not ref.data:
        return torch.empty(ref.shape, dtype=dtype_of(ref))
    flat = torch.frombuffer(bytearray(ref.data), dtype=dtype_of(ref))
    return flat.view(ref.shape)


def check_size(ref: TensorRef) -> None:
    """Raises CarrierError when shape and dtype do not make the size."""
    size_bytes = prod(ref.shape) * dtype_of(ref).itemsize
    if size_bytes != ref.size_bytes or min(ref.shape, default=0) < 0:
        raise CarrierError(f"a tensor {list(ref.shape)} of {ref.dtype} has not {ref.size_bytes} bytes")


def dtype_name(tensor: Tensor) -> DtypeName:
    """`float32` for torch.float32."""
    return cast(DtypeName, str(tensor.dtype).removeprefix("torch."))


def dtype_of(ref: TensorRef) -> torch.dtype:
    """The torch dtype that `ref` names."""
    dtype = getattr(torch, ref.dtype)
    assert isinstance(dtype, torch.dtype), ref.dtype
    return dtype
