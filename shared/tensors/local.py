"""Carrier `local`: the tensor itself, for stages of one process; a copy where their devices differ.

Nothing is copied where both stages have the same device: nobody may write to a tensor that was put.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from shared.errors import CarrierError, StaleTensorError
from shared.messages.cluster import LinkAnswer, LinkOffer, LinkPurpose
from shared.tensors.inline import dtype_name
from shared.tensors.ref import TensorRef

CARRIER = "local"
MAX_UNREAD = 1024
"""Tensors of one link that nobody has taken; more mean that the consumer does not keep to the protocol."""


class LocalTensors:
    """The tensors on their way between the stages of this process. Any thread may call."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._unread: dict[str, dict[int, tuple[Tensor, Any]]] = {}
        """Place -> generation -> tensor, and the event behind what computes it on a GPU."""
        self._generations = itertools.count(1)
        """No two tensors have the same."""

    def __contains__(self, place: str) -> bool:
        return place in self._unread

    def open(self, place: str) -> None:
        """Make the place, empty; what lay there before is gone."""
        self._unread[place] = {}

    def close(self, place: str) -> None:
        self._unread.pop(place, None)

    def put(self, place: str, tensor: Tensor) -> TensorRef:
        """Raises CarrierError when too many are unread there."""
        unread = self._unread[place]
        if len(unread) >= MAX_UNREAD:
            raise CarrierError(f"{MAX_UNREAD} tensors at {place} still unread")
        generation = next(self._generations)
        written = self._cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None
        unread[generation] = tensor.detach(), written
        return TensorRef(
            carrier=CARRIER,
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor),
            size_bytes=tensor.numel() * tensor.element_size(),
            place=place,
            generation=generation,
        )

    def take(self, ref: TensorRef, device: torch.device) -> Tensor:
        """The tensor, on `device`; it can be taken once. Raises StaleTensorError when it is gone."""
        found = self._unread.get(ref.place, {}).pop(ref.generation, None)
        if found is None:
            raise StaleTensorError(f"{ref.place}: {ref.generation} was taken before, or never there")
        tensor, written = found
        if written is not None:
            # A copy to another GPU runs on this thread's stream of the tensor's own GPU.
            stream = self._cuda.current_stream(tensor.device)
            stream.wait_event(written)
            tensor.record_stream(stream)
        return tensor.to(device)

    def discard(self, ref: TensorRef) -> None:
        """Let go of the tensor, if it is still there."""
        self._unread.get(ref.place, {}).pop(ref.generation, None)


class LocalLink:
    """An `OutgoingLink` to another stage of this process."""

    def __init__(self, tensors: LocalTensors, place: str) -> None:
        self._tensors = tensors
        self._place = place
        tensors.open(place)

    def offer(self, stage: int, instance: str, purpose: LinkPurpose = "activations") -> LinkOffer:
        return LinkOffer(stage=stage, instance=instance, purpose=purpose, carrier=CARRIER, place=self._place)

    def connect(self, answer: LinkAnswer) -> None:
        """The consumer has the tensors already."""

    def put(self, tensor: Tensor) -> TensorRef:
        return self._tensors.put(self._place, tensor)

    def take_back(self, ref: TensorRef) -> None:
        """Let go of it."""
        self._tensors.discard(ref)

    @property
    def is_lost(self) -> bool:
        """Nothing lies between the two that could break."""
        return False

    def close(self) -> None:
        """Let go of all that nobody has taken."""
        self._tensors.close(self._place)
