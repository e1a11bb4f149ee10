"""The streams and events of `torch.cuda`, played: when work runs, and what it waits for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class PlayedStream:
    """Runs what is launched on it in order."""

    cuda: "PlayedCuda"
    priority: int
    free_ms: float = 0.0
    """When all that was launched so far is done."""
    done_before: set[str] = field(default_factory=set)
    """All that is done before what is launched next begins."""

    def wait_stream(self, stream: "PlayedStream") -> None:
        self.wait_event(stream.record_event())

    def record_event(self) -> "PlayedEvent":
        event = self.cuda.Event()
        event.record(self)
        return event

    def wait_event(self, event: "PlayedEvent") -> None:
        self.free_ms = max(self.free_ms, event.at_ms)
        self.done_before |= event.done_before


@dataclass(eq=False)
class PlayedEvent:
    """A point in the work of a stream."""

    cuda: "PlayedCuda"
    has_time: bool
    at_ms: float = 0.0
    done_before: frozenset[str] = frozenset()

    def record(self, stream: PlayedStream) -> None:
        self.at_ms = max(stream.free_ms, self.cuda.now_ms)
        self.done_before = frozenset(stream.done_before)

    def query(self) -> bool:
        return self.cuda.now_ms >= self.at_ms

    def synchronize(self) -> None:
        self.cuda.now_ms = max(self.cuda.now_ms, self.at_ms)

    def elapsed_time(self, end_event: "PlayedEvent") -> float:
        if not (self.has_time and end_event.has_time and self.query() and end_event.query()):
            raise RuntimeError("both events must be timed, and over")
        return end_event.at_ms - self.at_ms


class PlayedCuda:
    """Implements what is used of `torch.cuda`. Launching takes none of the host's time, `now_ms`."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.done_before: dict[str, frozenset[str]] = {}
        """For each piece of work: what was done before it began, whatever the streams' speeds."""
        self.priorities: dict[str, int] = {}
        self._default = PlayedStream(self, priority=0)
        self._current = [self._default]

    def Stream(self, device: Any = None, priority: int = 0) -> PlayedStream:
        return PlayedStream(self, priority)

    def Event(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> PlayedEvent:
        return PlayedEvent(self, enable_timing)

    def current_stream(self, device: Any = None) -> PlayedStream:
        return self._current[-1]

    @contextmanager
    def stream(self, stream: PlayedStream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def launch(self, name: str, ms: float = 1.0) -> None:
        """Launch work on the current stream."""
        stream = self._current[-1]
        self.done_before[name] = frozenset(stream.done_before)
        self.priorities[name] = stream.priority
        stream.free_ms = max(stream.free_ms, self.now_ms) + ms
        stream.done_before.add(name)
