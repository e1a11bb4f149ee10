"""Corrections as training batches, and how those stand. Pure."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from typing import Literal

from pydantic_core import to_json

from services.gateway.feedback.answers import LessonKind
from shared.messages.lineage import MAX_NAME_CHARACTERS
from shared.messages.training import (
    BatchApplied,
    BatchDurable,
    BatchEvent,
    BatchHeldOut,
    BatchPlaced,
    BatchRejected,
)

ENVELOPE_BYTES = 1024
"""More than a batch has around its lessons, headers of its message included."""
SOURCE_BYTES = 1024
"""More than the source of one lesson takes."""

BatchStatus = Literal["assigned", "published", "applied", "durable", "rejected", "held_out"]


@dataclass(frozen=True, slots=True)
class WaitingLesson:
    """A lesson that is to be published."""

    number: int
    """Counts lessons, in the order of their arrival."""
    feedback_id: str
    kind: LessonKind
    producer: str
    created_at: int
    line: bytes

    @property
    def num_bytes(self) -> int:
        """Its share of a batch."""
        return len(self.line) + SOURCE_BYTES


@dataclass(frozen=True, slots=True)
class Batch:
    """Lessons of one kind that are published together."""

    id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class BatchState:
    """How a batch stands."""

    id: str
    status: BatchStatus
    """`assigned`: its lessons are chosen, and it is to be published (again)."""
    sequence: int = 0
    """Its place in the training stream; 0: not published yet."""
    version: int | None = None
    """The weights version that it has made, or the durable one that contains it."""
    reason: str = ""
    """Why it was rejected."""
    held_out: tuple[int, ...] = ()
    """Positions of its lessons that are held out while the others train, as far as heard since the start."""

    @property
    def is_final(self) -> bool:
        return self.status in ("durable", "rejected", "held_out")


def due(
    lessons: Sequence[WaitingLesson], *, now_s: float, size: int, after_s: float, max_bytes: int
) -> list[WaitingLesson]:
    """The lessons to publish together now: `size` of them, or fewer when the oldest has waited for `after_s`.

    `lessons`: those of one kind, oldest first.
    """
    chosen: list[WaitingLesson] = []
    num_bytes = ENVELOPE_BYTES
    for lesson in lessons[:size]:
        num_bytes += lesson.num_bytes
        if chosen and num_bytes > max_bytes:
            return chosen
        chosen.append(lesson)
    is_late = bool(chosen) and now_s - chosen[0].created_at >= after_s
    return chosen if len(chosen) == size or is_late else []


def batch_of(lessons: Sequence[WaitingLesson]) -> Batch:
    """The batch of these lessons: the same one, with the same id, however often it is made."""
    named = "\n".join([lessons[0].kind, *(lesson.feedback_id for lesson in lessons)])
    batch_id = f"feedback-{hashlib.sha256(named.encode()).hexdigest()[:32]}"
    sources = [
        {
            "id": lesson.feedback_id,
            "producer": lesson.producer,
            "sha256": hashlib.sha256(lesson.line).hexdigest(),
        }
        for lesson in lessons
    ]
    producers = sorted({lesson.producer for lesson in lessons})
    about = {
        "id": batch_id,
        "producer": ", ".join(producers)[:MAX_NAME_CHARACTERS],
        "sources": sources,
    }
    examples = b",".join(lesson.line for lesson in lessons)
    return Batch(batch_id, to_json(about)[:-1] + b',"examples":[' + examples + b"]}")


def after(state: BatchState, event: BatchEvent) -> BatchState:
    """How the batch stands after an event of it."""
    match event:
        case BatchPlaced() if state.status == "applied":  # its node has lost it
            return replace(state, status="published", version=None)
        case BatchApplied(version=version) if not state.is_final:
            return replace(state, status="applied", version=version, held_out=event.held_out)
        case BatchDurable(version=version) if state.status != "durable":
            held_out = event.held_out.get(state.id, ())
            return replace(state, status="durable", version=version, held_out=held_out)
        case BatchRejected(reason=reason):  # a rollback may take out what was durable
            return replace(state, status="rejected", version=None, reason=reason)
        case BatchHeldOut():
            return replace(state, status="held_out")
    return state


def newest_durable(states: Iterable[BatchState], limit: int) -> list[str]:
    """Ids of the durable batches that are last in the training stream: a rollback takes out these first."""
    durable = (state for state in states if state.status == "durable")
    return [state.id for state in nlargest(limit, durable, key=lambda state: state.sequence)]


def after_unknown(state: BatchState, read_up_to: int) -> BatchState:
    """The trainer, which has read the stream up to `read_up_to`, knows nothing of the batch."""
    if state.is_final or state.sequence > read_up_to:
        return state
    return replace(state, status="assigned", sequence=0, version=None)
