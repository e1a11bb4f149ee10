"""How a stage hands tensors to its neighbours: the carrier is chosen when two of them meet."""

from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shared.errors import CarrierError, StaleTensorError
from shared.messages.cluster import LinkAnswer, LinkOffer, LinkPurpose
from shared.tensors import cuda_ipc, inline, local, point_to_point, shm
from shared.tensors.gpu_memory import FindGpu, gpu_named
from shared.tensors.local import LocalTensors
from shared.tensors.point_to_point import CollectiveReader
from shared.tensors.ref import INLINE_LIMIT_BYTES, TensorRef


class OutgoingLink(Protocol):
    """Tensors from this stage to one other. `put` belongs to one thread."""

    def offer(self, stage: int, instance: str, purpose: LinkPurpose = "activations") -> LinkOffer:
        """The facts that the consumer needs to take tensors."""
        ...

    def connect(self, answer: LinkAnswer) -> None:
        """The consumer has answered."""
        ...

    def put(self, tensor: Tensor) -> TensorRef:
        """Hand over a tensor that nobody writes to any more. Raises CarrierError when that cannot be done."""
        ...

    def take_back(self, ref: TensorRef) -> None:
        """Give back the room of a tensor that was put, of which the consumer has not been told."""
        ...

    @property
    def is_lost(self) -> bool:
        """Whether it has broken, though both sides may live. Any thread may ask."""
        ...

    def close(self) -> None:
        """Leave nothing behind, should the consumer never have come."""
        ...


class SharedMemoryLink:
    """An `OutgoingLink` to a process that can open an arena, or else in messages."""

    def __init__(self, path: Path, *, slot_bytes: int, num_slots: int) -> None:
        """Raises CarrierError when there is no memory for the arena."""
        self._arena = shm.ArenaWriter(path, slot_bytes=slot_bytes, num_slots=num_slots)
        self._is_shared = False

    def offer(self, stage: int, instance: str, purpose: LinkPurpose = "activations") -> LinkOffer:
        """The facts that the consumer needs to open the arena."""
        arena = self._arena
        return LinkOffer(
            stage=stage,
            instance=instance,
            purpose=purpose,
            carrier=shm.CARRIER,
            place=str(arena.path),
            slot_bytes=arena.slot_bytes,
            num_slots=arena.num_slots,
        )

    def connect(self, answer: LinkAnswer) -> None:
        """Use the arena if the consumer has it, else send inline."""
        self._is_shared = answer.accepted
        self._arena.unlink()

    @property
    def is_lost(self) -> bool:
        """Memory lasts as long as the two processes."""
        return False

    def close(self) -> None:
        """Remove the arena's file if the consumer never came."""
        self._arena.unlink()

    def put(self, tensor: Tensor) -> TensorRef:
        """Hand over a copy. Raises CarrierError when it fits neither a slot nor a message."""
        if self._is_shared:
            return self._arena.put(tensor)
        size_bytes = tensor.numel() * tensor.element_size()
        if size_bytes > INLINE_LIMIT_BYTES:
            raise CarrierError(
                f"{size_bytes} bytes for another host or container: only {INLINE_LIMIT_BYTES} go inline; "
                "stages of a node must share LEMIX_SHM_DIR"
            )
        return inline.put(tensor)

    def take_back(self, ref: TensorRef) -> None:
        """Free its slot, if it has one."""
        if ref.carrier == shm.CARRIER:
            self._arena.take_back(ref)


class Reader(Protocol):
    """The consumer's side of a link from another process."""

    def take(self, ref: TensorRef, device: torch.device) -> Tensor: ...

    def discard(self, ref: TensorRef) -> None: ...

    def close(self) -> None: ...


class IncomingLinks:
    """The links that other stages offered to this one, and what stages of this process hand over."""

    def __init__(
        self,
        device: torch.device,
        local_tensors: LocalTensors | None = None,
        *,
        host: str = "127.0.0.1",
        timeout_s: float = 60.0,
        find_gpu: FindGpu = gpu_named,
    ) -> None:
        """`local_tensors`: None where no other stage is in this process.

        `host`: this machine's address where other hosts reach it. `timeout_s`: longest wait for one of them.
        """
        self._find_gpu = find_gpu
        self._device = device
        self._local = local_tensors or LocalTensors()
        self._host = host
        self._timeout_s = timeout_s
        self._readers: dict[str, Reader] = {}
        """By the place that was offered."""
        self._place_of: dict[tuple[int, LinkPurpose], str] = {}

    def accept(self, offer: LinkOffer) -> LinkAnswer:
        """Open a link; it replaces what the same stage offered for the same purpose before."""
        if offer.carrier == local.CARRIER:
            return LinkAnswer(accepted=offer.place in self._local, reason="local to another process")
        try:
            reader = self._opened(offer)
        except CarrierError as error:
            return LinkAnswer(accepted=False, reason=str(error))
        link = offer.stage, offer.purpose
        if (before := self._readers.pop(self._place_of.get(link, ""), None)) is not None:
            before.close()
        self._readers[offer.place], self._place_of[link] = reader, offer.place
        return LinkAnswer(accepted=True)

    def _opened(self, offer: LinkOffer) -> Reader:
        if offer.carrier == point_to_point.CARRIER:
            return CollectiveReader(
                offer.place, device=self._device, host=self._host, timeout_s=self._timeout_s
            )
        if offer.carrier == cuda_ipc.CARRIER:
            return self._ring_reader(offer)
        return shm.ArenaReader(Path(offer.place), slot_bytes=offer.slot_bytes, num_slots=offer.num_slots)

    def _ring_reader(self, offer: LinkOffer) -> Reader:
        name = offer.ring.gpu if offer.ring else ""
        gpu = self._find_gpu(name, self._device)
        if gpu is None:
            raise CarrierError(f"this stage, on {self._device}, does not see GPU {name!r}")
        return cuda_ipc.ring_reader(offer, gpu)

    def take(self, ref: TensorRef) -> Tensor:
        """The tensor on this stage's device, for this stage alone.

        Raises CarrierError; StaleTensorError when it is gone.
        """
        if ref.carrier == local.CARRIER:
            return self._local.take(ref, self._device)
        if ref.carrier == inline.CARRIER:
            return inline.take(ref).to(self._device)
        if ref.place not in self._readers:
            raise StaleTensorError(f"no link {ref.place} is open here")
        return self._readers[ref.place].take(ref, self._device)

    def discard(self, ref: TensorRef) -> None:
        """Give back the room of a tensor that nobody wants any more; one that is gone is no news."""
        if ref.carrier == local.CARRIER:
            self._local.discard(ref)
        elif ref.place in self._readers:
            with suppress(CarrierError):
                self._readers[ref.place].discard(ref)

    def close(self) -> None:
        """Leave all links."""
        for reader in self._readers.values():
            reader.close()
