"""The tasks of one node: those that live, and those that have lately ended. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from services.scheduler.node.known_work import Batch
from services.scheduler.tasks import Assigned
from shared.slices import TRAINING_TURN


@dataclass(slots=True)
class Leaving:
    """A task that has ended."""

    task: Assigned
    batch: Batch | None
    """None: it was a request."""
    until_s: float
    """By then its stages have told of all that they did for it."""


class NodeTasks:
    """Knows each task from its assignment until no stage can tell of it any more."""

    def __init__(self) -> None:
        self._tasks: dict[str, Assigned] = {}
        """Living, in the order of their assignment."""
        self._batches: dict[str, Batch] = {}
        """The training batches among them."""
        self._leaving: dict[str, Leaving] = {}
        """Tasks that have ended, in that order, and whose stages may not have told of their last ops: what is
        known of these still counts."""

    @property
    def num_inference(self) -> int:
        """Living inference tasks."""
        return len(self._tasks) - len(self._batches)

    @property
    def training_turn(self) -> float:
        """The least of the living requests."""
        requests = (task for task in self._tasks.values() if task.kind == "inference")
        return min((task.shape.pace.training_turn for task in requests), default=TRAINING_TURN)

    def living(self) -> Iterable[Assigned]:
        """In the order of their assignment."""
        return self._tasks.values()

    def living_batches(self) -> Iterable[Batch]:
        """In the order of their assignment."""
        return self._batches.values()

    def known_batches(self) -> list[Batch]:
        """Batches that a stage may still work on: ended ones first."""
        ended = [each.batch for each in self._leaving.values() if each.batch is not None]
        return ended + list(self._batches.values())

    def task(self, task_id: str) -> Assigned | None:
        """A task that lives, or whose stages may still tell of it."""
        leaving = self._leaving.get(task_id)
        return self._tasks.get(task_id) or (leaving.task if leaving else None)

    def batch(self, batch_id: str) -> Batch | None:
        """A batch that lives, or whose stages may still tell of it."""
        leaving = self._leaving.get(batch_id)
        return self._batches.get(batch_id) or (leaving.batch if leaving else None)

    def add(self, task: Assigned, batch: Batch | None = None) -> None:
        """Add a task; one of training with its batch."""
        self._tasks[task.task_id] = task
        if batch is not None:
            self._batches[task.task_id] = batch

    def end(self, task_id: str, until_s: float) -> None:
        """Let a living task end; until then its stages may tell of it."""
        task, batch = self._tasks.pop(task_id), self._batches.pop(task_id, None)
        self._leaving[task_id] = Leaving(task, batch, until_s)

    def forget(self, now_s: float) -> list[Leaving]:
        """Forget the ended tasks of which no stage can tell any more; returns these."""
        left: list[Leaving] = []
        while self._leaving:
            task_id, leaving = next(iter(self._leaving.items()))
            if now_s < leaving.until_s:
                break
            del self._leaving[task_id]
            left.append(leaving)
        return left

    def clear(self) -> None:
        """Start again without tasks."""
        self._tasks.clear()
        self._batches.clear()
        self._leaving.clear()
