"""Tasks as the scheduler sees them: their sizes, and their progress on their node. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.scheduler.forecast import Interval
from shared.messages.cluster import TaskKind
from shared.messages.inference import OWN_PACE, InferenceTask, Pace
from shared.messages.training import TrainingTask
from shared.profiles.times import NO_WORK, Work, work_of_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskShape:
    """The size of a task."""

    prompt_tokens: int = 0
    max_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that its node need not compute."""
    pace: Pace = OWN_PACE
    """The room that a request leaves to others."""
    microbatches: tuple[Work, ...] = ()
    """The microbatches of a training task."""

    @property
    def num_tokens(self) -> int:
        """Rows of its forwards: the length that the paper's length consistency compares."""
        return self.prompt_tokens + sum(work.num_tokens for work in self.microbatches)


NO_SHAPE = TaskShape()


def shape_of(task: InferenceTask | TrainingTask) -> TaskShape:
    """The size of a task, as the scheduler needs it."""
    if isinstance(task, InferenceTask):
        num_prompt_tokens = len(task.prompt)
        return TaskShape(prompt_tokens=num_prompt_tokens, max_tokens=task.most_tokens - num_prompt_tokens)
    lengths = task.microbatch_lengths or tuple((tokens,) for tokens in task.microbatch_tokens)
    return TaskShape(microbatches=tuple(_work_of_examples(examples) for examples in lengths))


def _work_of_examples(lengths: Sequence[int]) -> Work:
    return sum((work_of_rows(0, length) for length in lengths), NO_WORK)


@dataclass(slots=True, eq=False)
class Assigned:
    """A task on its node. `forward` and `backward` hold forecast times by stage, then the real ones.

    Empty intervals when it was placed without a forecast.
    """

    task_id: str
    kind: TaskKind
    shape: TaskShape
    arrived_s: float
    assigned_s: float
    forward: list[Interval]
    backward: list[Interval]
    num_generated: int = 0
    """Tokens (inference), as far as it can be told from the sizes of iterations."""
    expected_s: float | None = None
    """When its prompt should be through the last stage, as predicted when it was placed by a forecast."""
    due_s: float | None = None
    """When its prompt must be through the last stage to be in time; None: see `PlacedTask`."""
    first_token_s: float | None = None
    """When its prompt was through the last stage."""
