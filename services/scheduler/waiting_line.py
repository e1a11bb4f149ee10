"""Requests that cannot be in time any more, in the order in which they are served. Pure."""

from bisect import bisect_left, insort
from typing import NamedTuple


class _Place(NamedTuple):
    priority: int
    arrived_s: float
    task_id: str


class WaitingLine:
    """Lower priorities go first; of equals, who came earlier. Joining and leaving cost O(n) at worst."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._by_task: dict[str, _Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._by_task

    @property
    def first(self) -> str | None:
        """The task whose turn it is."""
        return self._places[0].task_id if self._places else None

    def join(self, task_id: str, priority: int, arrived_s: float) -> None:
        """Stand in line; a task that stands there already keeps its place."""
        if task_id not in self._by_task:
            place = self._by_task[task_id] = _Place(priority, arrived_s, task_id)
            insort(self._places, place)

    def leave(self, task_id: str) -> None:
        """Leave the line; nothing happens when the task is not in it."""
        place = self._by_task.pop(task_id, None)
        if place is not None:
            del self._places[bisect_left(self._places, place)]
