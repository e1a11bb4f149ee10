"""CUDA graphs: what a program launches, recorded once and replayed at a launch's cost."""

import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Program: TypeAlias = Callable[[], Tensor]
Capture: TypeAlias = Callable[[Program], Program]

_ONE_AT_A_TIME = threading.Lock()
"""A capture first waits for the whole device, which fails while another thread captures there."""
_NUM_WARM_UPS = 2
"""Runs before the capture: libraries take their memory and choose their kernels in the first."""


class GraphCapture:
    """Captures one program after the other into one pool of memory: give the largest first.

    All on the present stream, which must not be the default one: what is captured keeps its priority.
    Programs must launch the same for any values in their tensors, and read nothing back. What a program
    returns lies in the pool, and is good until the next replay of any of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, program: Program) -> Program:
        """Capture the program; returns its replay. Raises RuntimeError when it cannot be captured."""
        stream = torch.cuda.current_stream(self._device)
        for _ in range(_NUM_WARM_UPS):
            program()
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process, which copy weights for a merge, may go on meanwhile.
        recording = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
        with _ONE_AT_A_TIME, recording:
            outputs = program()
        self._pool = self._pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return outputs

        return replay


def run_again(program: Program) -> Program:
    """Captures nothing: the program runs anew each time."""
    return program


def capture_for(device: torch.device) -> Capture | None:
    """How static steps are captured on a device; None: there they would be no faster."""
    return GraphCapture(device) if device.type == "cuda" else None
