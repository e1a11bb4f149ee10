"""The calls to CUDA by which two processes of one host share a GPU's memory and order their work on it.

A handle is bytes that open the same thing in another process; opened by the one that made it, it fails.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from msgspec import DecodeError, msgpack
from torch import Tensor

from shared.errors import CarrierError
from shared.tensors.collective import hardware_name

StorageHandle = tuple[int, bytes, int, int, bytes, int, bytes, bool]
"""Device, memory, size, offset, reference counter, its offset, event, whether to wait for it: as in torch."""
_HANDLE = msgpack.Decoder(StorageHandle)
_EVENT: Any = torch.cuda.Event


class Event(Protocol):
    """A point in the work of a GPU."""

    def record(self) -> None:
        """Put the point after all work that this thread has given to the GPU's current stream."""
        ...

    def wait(self) -> None:
        """Let the current stream's later work wait for the point that was recorded last; does not block."""
        ...


class Gpu(Protocol):
    """One GPU as this process sees it."""

    @property
    def name(self) -> str:
        """The same in all processes."""
        ...

    def new_memory(self, size_bytes: int) -> tuple[Tensor, bytes]:
        """Memory of uint8, and its handle. Raises CarrierError when there is none to share."""
        ...

    def open_memory(self, handle: bytes) -> Tensor:
        """The memory of another process. Raises CarrierError."""
        ...

    def new_event(self) -> tuple[Event, bytes]:
        """An event, and its handle. Raises CarrierError."""
        ...

    def open_event(self, handle: bytes) -> Event:
        """The event of another process. Raises CarrierError."""
        ...


class CudaGpu:
    """Implements `Gpu` by torch."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", device.index or 0)
        self.name = hardware_name(self._device)

    def new_memory(self, size_bytes: int) -> tuple[Tensor, bytes]:
        with _carrier_errors():
            memory = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
            storage: Any = memory.untyped_storage()  # this and what follows have no types in torch
            return memory, msgpack.encode(storage._share_cuda_())

    def open_memory(self, handle: bytes) -> Tensor:
        with _carrier_errors():
            _, *there = _HANDLE.decode(handle)
            storage = torch.UntypedStorage._new_shared_cuda(self._device.index, *there)
            return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)

    def new_event(self) -> tuple[Event, bytes]:
        with _carrier_errors(), torch.cuda.device(self._device):
            event = _EVENT(interprocess=True)
            return _CudaEvent(event, self._device), event.ipc_handle()

    def open_event(self, handle: bytes) -> Event:
        with _carrier_errors():
            return _CudaEvent(_EVENT.from_ipc_handle(self._device, handle), self._device)


class _CudaEvent:
    def __init__(self, event: Any, device: torch.device) -> None:
        self._event = event
        self._device = device

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        self._event.wait(torch.cuda.current_stream(self._device))


FindGpu = Callable[[str, torch.device], Gpu | None]
"""See `gpu_named`."""


def gpu_named(name: str, own: torch.device) -> Gpu | None:
    """The GPU, for a stage that computes on `own`; None where that is a CPU, or does not see the GPU."""
    if own.type != "cuda":
        return None
    gpus = (CudaGpu(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
    return next((gpu for gpu in gpus if gpu.name == name), None)


@contextmanager
def _carrier_errors() -> Iterator[None]:
    """Turn errors of torch, as where a driver or a container forbids the sharing, into CarrierError."""
    try:
        yield
    except (RuntimeError, DecodeError, TypeError) as error:
        raise CarrierError(f"GPU memory cannot be shared here: {error}") from error
