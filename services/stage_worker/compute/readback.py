"""Numbers on their way from the device to the host."""

import torch
from torch import Tensor


class Readback:
    """A copy of whole numbers as they are now. The device goes on meanwhile, and so may the host."""

    def __init__(self, numbers: Tensor) -> None:
        self._on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        self._on_host.copy_(numbers, non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch is untyped here
            self._arrived.record()

    def wait(self) -> list[int]:
        """The numbers, once they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[int] = self._on_host.tolist()
        return numbers
