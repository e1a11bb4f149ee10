"""Carrier `shm`: a preallocated arena of slots in shared memory, one producer, one consumer, one host.

Each slot has two counters in the arena's first page: how often it was written, and up to which
writing it was read. It is free when both are equal, so the consumer gives it back without a message.
The file is unlinked as soon as the consumer has mapped it: whatever dies later, nothing leaks.
"""

import mmap
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from shared.errors import CarrierError, StaleTensorError
from shared.tensors.inline import check_size, dtype_name, dtype_of
from shared.tensors.ref import TensorRef

CARRIER = "shm"
_HEADER_BYTES = 4096
_MAX_SLOTS = _HEADER_BYTES // 16
_ALIGNMENT_BYTES = 64
_WAIT_STEP_S = 0.0005


class _Mapping:
    """The arena's memory as both sides see it. Never closed by hand: a closed map under a view is a crash."""

    def __init__(self, file: int, slot_bytes: int, num_slots: int) -> None:
        memory = mmap.mmap(file, _HEADER_BYTES + slot_bytes * num_slots)
        counters = memoryview(memory)[:_HEADER_BYTES].cast("q")
        self.written, self.read = counters[:num_slots], counters[num_slots : 2 * num_slots]
        everything = torch.frombuffer(memory, dtype=torch.uint8)[_HEADER_BYTES:]
        self.slots = everything.view(num_slots, slot_bytes)

    def view(self, ref: TensorRef) -> Tensor:
        """Raises CarrierError when no such tensor can lie here."""
        check_size(ref)
        num_slots, slot_bytes = self.slots.shape
        if ref.slot >= num_slots or ref.size_bytes > slot_bytes:
            raise CarrierError(
                f"{ref.size_bytes} bytes in slot {ref.slot}: there are {num_slots} of {slot_bytes} bytes"
            )
        return self.slots[ref.slot, : ref.size_bytes].view(dtype_of(ref)).view(ref.shape)


class ArenaWriter:
    """The producer's side. `put` belongs to one thread."""

    def __init__(self, path: Path, *, slot_bytes: int, num_slots: int) -> None:
        """Create the file. Raises CarrierError when the memory is not to be had."""
        assert 0 < num_slots <= _MAX_SLOTS, num_slots
        self.path = path
        self.slot_bytes = -(-slot_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.num_slots = num_slots
        try:
            self._memory = self._create()
        except OSError as error:
            raise CarrierError(
                f"no {self.slot_bytes * num_slots} bytes of shared memory at {path}: {error}"
            ) from error

    def _create(self) -> _Mapping:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # A full /dev/shm kills the process at first touch (SIGBUS); reserving asks first.
            os.posix_fallocate(file, 0, _HEADER_BYTES + self.slot_bytes * self.num_slots)
            return _Mapping(file, self.slot_bytes, self.num_slots)
        except OSError:
            self.path.unlink()
            raise
        finally:
            os.close(file)

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
        slot = self._free_slot(timeout_s)
        ref = TensorRef(
            carrier=CARRIER,
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor),
            size_bytes=size_bytes,
            place=str(self.path),
            slot=slot,
            generation=self._memory.written[slot] + 1,
        )
        self._memory.view(ref).copy_(tensor.detach())
        self._memory.written[slot] = ref.generation
        return ref

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
        counters = enumerate(zip(self._memory.written, self._memory.read, strict=True))
        return next((slot for slot, (written, read) in counters if written == read), None)


class ArenaReader:
    """The consumer's side."""

    def __init__(self, path: Path, *, slot_bytes: int, num_slots: int) -> None:
        """Map the producer's file. Raises CarrierError when it is not within reach."""
        try:
            file = os.open(path, os.O_RDWR)
        except OSError as error:
            raise CarrierError(f"cannot open {path}: {error}") from error
        try:
            self._memory = _Mapping(file, slot_bytes, num_slots)
        except (OSError, ValueError) as error:  # ValueError: the file is shorter than that
            raise CarrierError(f"cannot map {path}: {error}") from error
        finally:
            os.close(file)

    def take(self, ref: TensorRef, device: torch.device) -> Tensor:
        """A private copy of the tensor; its slot is free again.

        Raises StaleTensorError, or CarrierError when no such tensor can lie here.
        """
        view = self._memory.view(ref)
        self._check_unread(ref)
        tensor = view.to(device, copy=True)
        self._memory.read[ref.slot] = ref.generation
        return tensor

    def discard(self, ref: TensorRef) -> None:
        """Free the tensor's slot unread. Raises as `take`."""
        self._memory.view(ref)
        self._check_unread(ref)
        self._memory.read[ref.slot] = ref.generation

    def close(self) -> None:
        """The mapping goes with the last tensor that lies in it."""

    def _check_unread(self, ref: TensorRef) -> None:
        written, read = self._memory.written[ref.slot], self._memory.read[ref.slot]
        if written != ref.generation:
            raise StaleTensorError(
                f"{ref.place} slot {ref.slot}: asked for {ref.generation}, there is {written}"
            )
        if read == ref.generation:
            raise StaleTensorError(f"{ref.place} slot {ref.slot}: {ref.generation} was taken before")
