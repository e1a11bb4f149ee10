"""Which of a device's work may run beside which.

Iterations run on a stream of high priority, training on the default one, whose priority is the lowest: it
gets what iterations leave. They may run at the same time, for a microbatch only reads the weights that serve.
What changes memory that iterations read (the end of a step, a version that is kept or let go, other weights)
runs between two of them: behind all that were launched before it, before all that are launched after it. The
device is told so by events; the host waits for nothing.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

HIGH_PRIORITY = -1
"""Lower numbers go first; the default stream has 0."""


class Streams(Protocol):
    """The streams of one device, for the thread that launches everything on it."""

    def serving(self) -> AbstractContextManager[object]:
        """Launch iterations."""
        ...

    def changing(self) -> AbstractContextManager[object]:
        """Launch what changes memory that iterations read."""
        ...


class OneAfterTheOther:
    """Where everything is done when it is launched."""

    def serving(self) -> AbstractContextManager[object]:
        return nullcontext()

    def changing(self) -> AbstractContextManager[object]:
        return nullcontext()


class CudaStreams:
    """Implements `Streams` on a GPU."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._iterations = cuda.Stream(device, priority=HIGH_PRIORITY)

    def serving(self) -> AbstractContextManager[object]:
        stream: AbstractContextManager[object] = self._cuda.stream(self._iterations)
        return stream

    @contextmanager
    def changing(self) -> Iterator[None]:
        default = self._cuda.current_stream(self._device)
        default.wait_stream(self._iterations)
        try:
            yield
        finally:
            self._iterations.wait_stream(default)


def streams_for(device: torch.device) -> Streams:
    """To be shared by all that launches on the device."""
    return CudaStreams(device) if device.type == "cuda" else OneAfterTheOther()
