"""A GPU that is played in host memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from shared.errors import CarrierError
from shared.tensors.gpu_memory import Event

T = TypeVar("T")


@dataclass
class Noted:
    """Implements `Event`: notes what was done with it."""

    name: str
    happened: list[str]

    def record(self) -> None:
        self.happened.append(f"record {self.name}")

    def wait(self) -> None:
        self.happened.append(f"wait {self.name}")


@dataclass
class PlayedGpu:
    """Implements `Gpu`, for a producer and a consumer in one process."""

    name: str = "GPU-0"
    happened: list[str] = field(default_factory=list)
    """All that was done with events, in order."""
    is_shareable: bool = True
    memory: dict[bytes, Tensor] = field(default_factory=dict)
    events: dict[bytes, Noted] = field(default_factory=dict)

    def new_memory(self, size_bytes: int) -> tuple[Tensor, bytes]:
        if not self.is_shareable:
            raise CarrierError("GPU memory cannot be shared here")
        handle = f"memory {len(self.memory)}".encode()
        self.memory[handle] = torch.empty(size_bytes, dtype=torch.uint8)
        return self.memory[handle], handle

    def open_memory(self, handle: bytes) -> Tensor:
        return _found(self.memory, handle)

    def new_event(self) -> tuple[Event, bytes]:
        name = f"event {len(self.events)}"
        event = self.events[name.encode()] = Noted(name, self.happened)
        return event, name.encode()

    def open_event(self, handle: bytes) -> Event:
        return _found(self.events, handle)

    def find(self, name: str, own: torch.device) -> "PlayedGpu | None":
        """As `gpu_named`, for a stage on this GPU."""
        return self if name in (self.name, "cpu") else None


def _found(things: Mapping[bytes, T], handle: bytes) -> T:
    if handle not in things:
        raise CarrierError(f"no such handle: {handle!r}")
    return things[handle]
