"""A device as its stages share it: one queue of work, and whose op it is doing."""

from dataclasses import dataclass, field

from services.stage_worker.pipeline.queue import WorkQueue
from shared.messages.events import StageOp


@dataclass(frozen=True, slots=True, eq=False)
class HandedOp:
    """An op that the executor of a stage was given."""

    stage: int
    op: StageOp | None
    since_s: float


@dataclass(slots=True)
class Turns:
    """A device does one op at a time, but the next ones may be handed to it before.

    Such an op starts when the one before it ends, of whichever stage it is.
    """

    handed: list[HandedOp] = field(default_factory=list)
    """In their order; the first one runs."""
    free_s: float = 0.0
    """When the last op ended."""


@dataclass(frozen=True, slots=True)
class Device:
    """The queue and the turns that stages on one device share."""

    first_stage: int
    queue: WorkQueue
    turns: Turns = field(default_factory=Turns)
