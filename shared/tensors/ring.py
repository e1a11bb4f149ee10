"""A ring of slots that one process writes and one other reads, on one host; where the slots lie is open.

Each slot has two counters in shared memory: how often it was written, and up to which writing it was read. It
is free when both are equal, so the consumer gives it back without a message. The file that holds the counters
is unlinked as soon as the consumer has mapped it: whatever dies later, nothing leaks.
"""

import mmap
import os
import time
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shared.errors import CarrierError, StaleTensorError
from shared.tensors.inline import check_size, dtype_name, dtype_of
from shared.tensors.ref import TensorRef

HEADER_BYTES = 4096
"""The counters; slots in the file come after them."""
MAX_SLOTS = HEADER_BYTES // 16
_ALIGNMENT_BYTES = 64
_WAIT_STEP_S = 0.0005


def aligned(slot_bytes: int) -> int:
    """The room of a slot, so that every slot can hold any dtype."""
    return -(-slot_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def create_file(path: Path, size_bytes: int) -> mmap.mmap:
    """Make a file in shared memory. Raises CarrierError when the memory is not to be had."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # A full /dev/shm kills the process at first touch (SIGBUS); reserving asks first.
            os.posix_fallocate(file, 0, size_bytes)
            return mmap.mmap(file, size_bytes)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(file)
    except OSError as error:
        slots_bytes = size_bytes - HEADER_BYTES
        raise CarrierError(f"no {slots_bytes} bytes of shared memory at {path}: {error}") from error


def open_file(path: Path, size_bytes: int) -> mmap.mmap:
    """Map the producer's file. Raises CarrierError when it is not within reach."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError as error:
        raise CarrierError(f"cannot open {path}: {error}") from error
    try:
        return mmap.mmap(file, size_bytes)
    except (OSError, ValueError) as error:  # ValueError: the file is shorter than that
        raise CarrierError(f"cannot map {path}: {error}") from error
    finally:
        os.close(file)


class Fences(Protocol):
    """The order of writing and reading where a device does both later than it is told to."""

    def before_write(self, slot: int) -> None: ...

    def after_write(self, slot: int) -> None: ...

    def before_read(self, slot: int) -> None: ...

    def after_read(self, slot: int) -> None: ...


class NoFences:
    """A processor has done what it was told when it does the next thing."""

    def before_write(self, slot: int) -> None: ...

    def after_write(self, slot: int) -> None: ...

    def before_read(self, slot: int) -> None: ...

    def after_read(self, slot: int) -> None: ...


class Ring:
    """The counters and slots as both sides see them."""

    def __init__(
        self, counters: mmap.mmap, slots: Tensor, *, carrier: str, path: Path, fences: Fences | None = None
    ) -> None:
        """`slots`: [num_slots, slot_bytes] of uint8. `path`: names the ring in messages."""
        num_slots = slots.shape[0]
        assert 0 < num_slots <= MAX_SLOTS, num_slots
        both = memoryview(counters)[:HEADER_BYTES].cast("q")
        self.written, self.read = both[:num_slots], both[num_slots : 2 * num_slots]
        self.slots = slots
        self.carrier = carrier
        self.path = path
        self.fences = fences or NoFences()

    def view(self, ref: TensorRef) -> Tensor:
        """Raises CarrierError when no such tensor can lie here."""
        check_size(ref)
        num_slots, slot_bytes = self.slots.shape
        if ref.slot >= num_slots or ref.size_bytes > slot_bytes:
            raise CarrierError(
                f"{ref.size_bytes} bytes in slot {ref.slot}: there are {num_slots} of {slot_bytes} bytes"
            )
        return self.slots[ref.slot, : ref.size_bytes].view(dtype_of(ref)).view(ref.shape)


class RingWriter:
    """The producer's side. `put` belongs to one thread."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring

    @property
    def path(self) -> Path:
        return self._ring.path

    @property
    def num_slots(self) -> int:
        return self._ring.slots.shape[0]

    @property
    def slot_bytes(self) -> int:
        return self._ring.slots.shape[1]

    def unlink(self) -> None:
        """Remove the file's name; both mappings live on."""
        self.path.unlink(missing_ok=True)

    def put(self, tensor: Tensor, *, timeout_s: float = 10.0) -> TensorRef:
        """Copy `tensor` into a free slot.

        Raises CarrierError when it is larger than a slot, or when no slot comes free in `timeout_s`.
        """
        size_bytes = tensor.numel() * tensor.element_size()
        if size_bytes > self.slot_bytes:
            raise CarrierError(f"tensor of {size_bytes} bytes for slots of {self.slot_bytes} bytes")
        ring, slot = self._ring, self._free_slot(timeout_s)
        ref = TensorRef(
            carrier=ring.carrier,
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor),
            size_bytes=size_bytes,
            place=str(self.path),
            slot=slot,
            generation=ring.written[slot] + 1,
        )
        ring.fences.before_write(slot)
        ring.view(ref).copy_(tensor.detach())
        ring.fences.after_write(slot)
        ring.written[slot] = ref.generation
        return ref

    def take_back(self, ref: TensorRef) -> None:
        """Free the slot of a tensor that the consumer, who does not know of it, will never read."""
        self._ring.read[ref.slot] = ref.generation

    def _free_slot(self, timeout_s: float) -> int:
        deadline_s = time.monotonic() + timeout_s
        while (slot := self._first_free()) is None:
            if time.monotonic() > deadline_s:
                raise CarrierError(
                    f"all {self.num_slots} slots of {self.path} still unread after {timeout_s} s"
                )
            time.sleep(_WAIT_STEP_S)
        return slot

    def _first_free(self) -> int | None:
        counters = enumerate(zip(self._ring.written, self._ring.read, strict=True))
        return next((slot for slot, (written, read) in counters if written == read), None)


class RingReader:
    """The consumer's side."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring

    def take(self, ref: TensorRef, device: torch.device) -> Tensor:
        """A private copy of the tensor; its slot is free again.

        Raises StaleTensorError, or CarrierError when no such tensor can lie here.
        """
        ring, view = self._ring, self._ring.view(ref)
        self._check_unread(ref)
        ring.fences.before_read(ref.slot)
        tensor = view.to(device, copy=True)
        ring.fences.after_read(ref.slot)
        ring.read[ref.slot] = ref.generation
        return tensor

    def discard(self, ref: TensorRef) -> None:
        """Free the tensor's slot unread. Raises as `take`."""
        self._ring.view(ref)
        self._check_unread(ref)
        self._ring.read[ref.slot] = ref.generation

    def close(self) -> None:
        """The mapping goes with the last tensor that lies in it."""

    def _check_unread(self, ref: TensorRef) -> None:
        written, read = self._ring.written[ref.slot], self._ring.read[ref.slot]
        if written != ref.generation:
            raise StaleTensorError(
                f"{ref.place} slot {ref.slot}: asked for {ref.generation}, there is {written}"
            )
        if read == ref.generation:
            raise StaleTensorError(f"{ref.place} slot {ref.slot}: {ref.generation} was taken before")
