"""The things that executors of one process share."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from services.stage_worker.compute.streams import Streams, streams_for
from shared.tensors.local import LocalTensors


class ComputeDevice(NamedTuple):
    """A device as its stages share it: the thread that launches everything there, and where it does."""

    thread: ThreadPoolExecutor
    streams: Streams


class LocalStages:
    """The stages of one process, their devices, and the tensors on their way between them."""

    def __init__(self) -> None:
        self.tensors = LocalTensors()
        self._devices: dict[str, ComputeDevice] = {}
        self._instances: set[str] = set()

    def __contains__(self, instance: str) -> bool:
        return instance in self._instances

    def enter(self, instance: str, device: str) -> ComputeDevice:
        """The stage's device, where its stages take turns."""
        self._instances.add(instance)
        if device not in self._devices:
            thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
            self._devices[device] = ComputeDevice(thread, streams_for(torch.device(device)))
        return self._devices[device]

    def leave(self, instance: str) -> None:
        """The stage has ended; the last one ends the threads."""
        self._instances.discard(instance)
        if not self._instances:
            for device in self._devices.values():
                device.thread.shutdown(wait=False, cancel_futures=True)
