"""Carrier `shm`: a preallocated arena, a ring whose slots lie in shared memory after its counters."""

import mmap
from pathlib import Path

import torch
from torch import Tensor

from shared.tensors.ring import HEADER_BYTES, Ring, RingReader, RingWriter, aligned, create_file, open_file

CARRIER = "shm"


class ArenaWriter(RingWriter):
    """The producer's side. `put` belongs to one thread."""

    def __init__(self, path: Path, *, slot_bytes: int, num_slots: int) -> None:
        """Create the file. Raises CarrierError when the memory is not to be had."""
        room_bytes = aligned(slot_bytes)
        memory = create_file(path, HEADER_BYTES + room_bytes * num_slots)
        super().__init__(_ring(memory, path, room_bytes, num_slots))


class ArenaReader(RingReader):
    """The consumer's side."""

    def __init__(self, path: Path, *, slot_bytes: int, num_slots: int) -> None:
        """Map the producer's file. Raises CarrierError when it is not within reach."""
        memory = open_file(path, HEADER_BYTES + slot_bytes * num_slots)
        super().__init__(_ring(memory, path, slot_bytes, num_slots))


def _ring(memory: mmap.mmap, path: Path, slot_bytes: int, num_slots: int) -> Ring:
    """The mapping is never closed by hand: a closed map under a view is a crash."""
    slots: Tensor = torch.frombuffer(memory, dtype=torch.uint8)[HEADER_BYTES:].view(num_slots, slot_bytes)
    return Ring(memory, slots, carrier=CARRIER, path=path)
