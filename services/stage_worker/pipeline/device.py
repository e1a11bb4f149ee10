"""A device as its stages share it: one queue of work, and whose op it is doing."""

from dataclasses import dataclass, field

from services.stage_worker.compute.executor import Took
from services.stage_worker.pipeline.queue import WorkQueue
from shared.messages.events import StageOp


@dataclass(slots=True, eq=False)
class HandedOp:
    """An op that the executor of a stage was given."""

    stage: int
    op: StageOp | None
    since_s: float
    """When it was handed over, or when all that was before it had ended."""
    took: Took = ()


@dataclass(slots=True)
class Turns:
    """A device does one op after the other, but the next ones may be handed to it before.

    Such an op starts when the one before it ends, of whichever stage it is. Where a GPU runs an iteration
    beside training, the later one may end first.
    """

    handed: list[HandedOp] = field(default_factory=list)
    """In their order; the first one runs."""

    def end(self, ended: HandedOp, now_s: float) -> None:
        """Take out an op; the next one may begin."""
        was_first = self.handed[0] is ended
        self.handed.remove(ended)
        if was_first and self.handed:
            self.handed[0].since_s = now_s


@dataclass(frozen=True, slots=True)
class Device:
    """The queue and the turns that stages on one device share."""

    first_stage: int
    queue: WorkQueue
    turns: Turns = field(default_factory=Turns)
