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
    given_way_s: float = 0.0
    """How long others have run between its slices."""


@dataclass(slots=True)
class Turns:
    """A device does one op after the other, but the next ones may be handed to it before.

    Such an op starts when the one before it ends, of whichever stage it is. A training op may stand aside
    between two of its slices, for one other op. Where a GPU runs an iteration beside training, the later one
    may end first.
    """

    handed: list[HandedOp] = field(default_factory=list)
    """In their order; the first one runs."""
    aside: HandedOp | None = None
    aside_since_s: float = 0.0

    def end(self, ended: HandedOp, now_s: float) -> None:
        """Take out an op; the next one may begin."""
        was_first = self.handed[0] is ended
        self.handed.remove(ended)
        if was_first and self.handed:
            self.handed[0].since_s = now_s

    def stand_aside(self, op: HandedOp, now_s: float) -> None:
        """Take out the running op for a while."""
        self.handed.remove(op)
        self.aside, self.aside_since_s = op, now_s

    def go_on(self, now_s: float) -> None:
        """Let the op that stands aside run again."""
        assert self.aside is not None, "an op stands aside first"
        self.aside.given_way_s += now_s - self.aside_since_s
        self.handed.insert(0, self.aside)
        self.aside = None


@dataclass(frozen=True, slots=True)
class Device:
    """The queue and the turns that stages on one device share."""

    first_stage: int
    queue: WorkQueue
    turns: Turns = field(default_factory=Turns)
