"""Copies of a stage's state in host memory, made beside the compute thread.

Tensors of a device go through two small buffers of pinned memory on a stream of their own, so that serving
goes on meanwhile. What changes the state waits until it is copied.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import cycle
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

CHUNK_BYTES: Final = 32 * 2**20
"""A copy has two chunks under way at most."""

T = TypeVar("T")


class Lane(Protocol):
    """A way from a device to the host."""

    def begin(self) -> None:
        """Begin to copy: tensors are copied as the work leaves them that this thread has launched so far."""
        ...

    def buffer(self, num_bytes: int) -> Tensor:
        """Host memory that the lane writes to, uint8."""
        ...

    def send(self, source: Tensor, buffer: Tensor) -> Callable[[], object]:
        """Launch a copy; returns how to wait for it."""
        ...


class CpuLane:
    """Copies at once."""

    def begin(self) -> None:
        """Everything that was launched has run."""

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, source: Tensor, buffer: Tensor) -> Callable[[], object]:
        buffer.copy_(source)
        return lambda: None


class CudaLane:
    """Copies on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch is untyped here

    def begin(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def send(self, source: Tensor, buffer: Tensor) -> Callable[[], object]:
        with torch.cuda.stream(self._stream):
            buffer.copy_(source, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch is untyped here
            arrived.record(self._stream)
        wait_for: Callable[[], object] = arrived.synchronize
        return wait_for


class StateCopies:
    """One copy of a stage's state after the other. `start` and `settle` belong to the compute thread."""

    def __init__(self, lane: Lane, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._lane = lane
        self._chunk_bytes = chunk_bytes
        self._buffers: list[Tensor] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copies")
        self._copying: Future[Any] | None = None

    def start(self, copy: Callable[[Callable[[Tensor], Tensor]], T]) -> Future[T]:
        """Run `copy`, in a thread of its own, with the function that copies one contiguous tensor."""
        self.settle()
        self._lane.begin()
        copying = self._copying = self._thread.submit(copy, self._to_host)
        return copying

    def settle(self) -> None:
        """Wait until nothing is being copied: the tensors may change."""
        if self._copying is not None:
            wait([self._copying])  # whoever asked for the copy learns of its error
            self._copying = None

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _to_host(self, tensor: Tensor) -> Tensor:
        """A copy of a contiguous tensor, in pieces of bounded size."""
        copied = torch.empty(tensor.shape, dtype=tensor.dtype)
        pieces = zip(self._pieces(tensor), self._pieces(copied), strict=True)
        sent: deque[tuple[Callable[[], object], Tensor, Tensor]] = deque()
        for (source, target), whole_buffer in zip(pieces, cycle(self._two_buffers()), strict=False):
            if len(sent) == len(self._buffers):
                _land(*sent.popleft())
            buffer = whole_buffer[: len(source)]
            sent.append((self._lane.send(source, buffer), buffer, target))
        while sent:
            _land(*sent.popleft())
        return copied

    def _pieces(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return torch.split(tensor.detach().reshape(-1).view(torch.uint8), self._chunk_bytes)

    def _two_buffers(self) -> list[Tensor]:
        """Made with the first copy: many stages never save."""
        if not self._buffers:
            self._buffers = [self._lane.buffer(self._chunk_bytes) for _ in range(2)]
        return self._buffers


def _land(arrived: Callable[[], object], buffer: Tensor, target: Tensor) -> None:
    arrived()
    target.copy_(buffer)
