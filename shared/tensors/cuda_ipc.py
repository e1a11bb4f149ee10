"""Carrier `cuda_ipc`: a ring whose slots lie in the producer's GPU, for two processes of one host.

Handles of the ring and of two events a slot are exchanged once, when the two meet; a message then carries
only a slot and its generation. No processor waits: the consumer's stream waits until the slot is written, and
the producer's until it is read, before it is written again. The counters lie in shared memory, as in `shm`.

Tested on a CPU with a GPU that is played; it has run on no card yet, and is not measured.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from shared.errors import CarrierError
from shared.messages.cluster import GpuRing, LinkAnswer, LinkOffer, LinkPurpose
from shared.tensors.gpu_memory import Event, Gpu
from shared.tensors.ref import TensorRef
from shared.tensors.ring import HEADER_BYTES, Ring, RingReader, RingWriter, aligned, create_file, open_file

CARRIER = "cuda_ipc"


class _Events:
    """Implements `Fences`: for each slot, when it was written, and when it was read."""

    def __init__(self, written: Sequence[Event], read: Sequence[Event]) -> None:
        self._written = written
        self._read = read

    def before_write(self, slot: int) -> None:
        self._read[slot].wait()
        self._written[slot].wait()  # on another stream, perhaps, and never read

    def after_write(self, slot: int) -> None:
        self._written[slot].record()

    def before_read(self, slot: int) -> None:
        self._written[slot].wait()

    def after_read(self, slot: int) -> None:
        self._read[slot].record()


class CudaIpcLink:
    """An `OutgoingLink` to a process that sees the same GPU and the same shared memory."""

    def __init__(self, gpu: Gpu, path: Path, *, slot_bytes: int, num_slots: int) -> None:
        """`path`: where the counters lie. Raises CarrierError when there is no memory to share."""
        room_bytes = aligned(slot_bytes)
        memory, handle = gpu.new_memory(room_bytes * num_slots)
        written, written_handles = zip(*(gpu.new_event() for _ in range(num_slots)), strict=True)
        read, read_handles = zip(*(gpu.new_event() for _ in range(num_slots)), strict=True)
        self._handles = GpuRing(gpu=gpu.name, memory=handle, written=written_handles, read=read_handles)
        self._writer = RingWriter(
            Ring(
                create_file(path, HEADER_BYTES),
                memory.view(num_slots, room_bytes),
                carrier=CARRIER,
                path=path,
                fences=_Events(written, read),
            )
        )
        self._is_accepted = False

    def offer(self, stage: int, instance: str, purpose: LinkPurpose = "activations") -> LinkOffer:
        writer = self._writer
        return LinkOffer(
            stage=stage,
            instance=instance,
            purpose=purpose,
            carrier=CARRIER,
            place=str(writer.path),
            slot_bytes=writer.slot_bytes,
            num_slots=writer.num_slots,
            ring=self._handles,
        )

    def connect(self, answer: LinkAnswer) -> None:
        """The consumer has the ring, or can never have it."""
        self._is_accepted = answer.accepted
        self._writer.unlink()

    def put(self, tensor: Tensor) -> TensorRef:
        """Hand over a copy. Raises CarrierError when it does not fit, or too many are unread."""
        if not self._is_accepted:
            raise CarrierError(f"nobody has accepted {self._writer.path}")
        return self._writer.put(tensor)

    def take_back(self, ref: TensorRef) -> None:
        """Free its slot."""
        self._writer.take_back(ref)

    @property
    def is_lost(self) -> bool:
        """Memory lasts as long as the two processes."""
        return False

    def close(self) -> None:
        """Remove the counters' file if the consumer never came."""
        self._writer.unlink()


def ring_reader(offer: LinkOffer, gpu: Gpu) -> RingReader:
    """The consumer's side, on the GPU that the offer names. Raises CarrierError."""
    ring, num_slots = offer.ring, offer.num_slots
    if ring is None or not len(ring.written) == len(ring.read) == num_slots:
        raise CarrierError(f"{offer.place} has not two events for each of {num_slots} slots")
    memory = gpu.open_memory(ring.memory)
    if memory.numel() != num_slots * offer.slot_bytes:
        raise CarrierError(f"{offer.place} has {memory.numel()} bytes, not those of {num_slots} slots")
    events = _Events(
        [gpu.open_event(each) for each in ring.written], [gpu.open_event(each) for each in ring.read]
    )
    counters = open_file(Path(offer.place), HEADER_BYTES)
    slots = memory.view(num_slots, offer.slot_bytes)
    return RingReader(Ring(counters, slots, carrier=CARRIER, path=Path(offer.place), fences=events))
