"""The things that executors of one process share."""

from concurrent.futures import ThreadPoolExecutor

from shared.tensors.local import LocalTensors


class LocalStages:
    """The stages of one process: a compute thread for each device, and tensors on their way between them."""

    def __init__(self) -> None:
        self.tensors = LocalTensors()
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._instances: set[str] = set()

    def __contains__(self, instance: str) -> bool:
        return instance in self._instances

    def enter(self, instance: str, device: str) -> ThreadPoolExecutor:
        """The thread of the stage's device, where its stages take turns."""
        self._instances.add(instance)
        if device not in self._threads:
            self._threads[device] = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        return self._threads[device]

    def leave(self, instance: str) -> None:
        """The stage has ended; the last one ends the threads."""
        self._instances.discard(instance)
        if not self._instances:
            for thread in self._threads.values():
                thread.shutdown(wait=False, cancel_futures=True)
