"""When a device has done what it was given, which on a GPU is long after the host has launched it."""

from collections.abc import Callable
from typing import TypeAlias

import torch

Wait: TypeAlias = Callable[[], object]
"""Returns when it is done; for a thread that may stand still."""


def end_mark_for(device: torch.device) -> Callable[[], Wait | None]:
    """A function that marks the end of all that its thread has launched on the device so far.

    It returns how to wait for that; None where everything is done at once.
    """
    return _CudaMark(device) if device.type == "cuda" else lambda: None


class _CudaMark:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self) -> Wait:
        end = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch is untyped here
        end.record(torch.cuda.current_stream(self._device))
        wait: Wait = end.synchronize
        return wait
