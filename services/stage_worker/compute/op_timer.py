"""How long a device takes for an op, which on a GPU begins and ends long after the host has launched it."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from services.stage_worker.compute.executor import OpTime, Took

End: TypeAlias = Callable[[], Took]
"""Ends an op: all that its thread has launched since `OpTimer` began it."""
OpTimer: TypeAlias = Callable[[], End]
"""Begins an op."""

_MS = 1e-3


def timer_for(device: torch.device) -> OpTimer:
    """The timer of the ops that one thread launches on a device."""
    return CudaTimer(device) if device.type == "cuda" else call_timer


def call_timer() -> End:
    """Where everything is done at once a call takes as long as its op, and whoever calls has a clock."""
    return lambda: ()


class CudaTimer:
    """Times the present stream's work by an event before it and one behind it."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda

    def __call__(self) -> End:
        began = self._mark()
        return lambda: (_CudaTime(began, self._mark()),)

    def _mark(self) -> Any:
        event = self._cuda.Event(enable_timing=True, blocking=True)
        event.record(self._cuda.current_stream(self._device))
        return event


class _CudaTime(OpTime):
    def __init__(self, began: Any, ended: Any) -> None:
        self._began = began
        self._ended = ended

    def is_over(self) -> bool:
        return bool(self._ended.query())

    def wait_s(self) -> float:
        self._ended.synchronize()
        elapsed_ms: float = self._began.elapsed_time(self._ended)
        return elapsed_ms * _MS
