"""The body of POST /v1/feedback, and feedback as the API shows it."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from services.gateway.feedback.answers import Json, LessonKind, as_trained
from services.gateway.feedback.feedback_store import FeedbackRecord, TaughtLesson
from services.gateway.jobs.paging import Listed
from services.gateway.openai.chat.messages import AssistantMessage, for_template
from services.gateway.openai.schema import RequestModel, Whole, invalid

LessonStatus = Literal["pending", "applied", "durable", "rejected", "held_out"]
FeedbackStatus = Literal["rated", "pending", "applied", "durable", "rejected", "held_out"]
_SHOWN_FIRST: Sequence[LessonStatus] = ("rejected", "pending", "applied", "durable", "held_out")
"""The status of a feedback is the first of these that one of its lessons has."""

Correction = Annotated[
    Annotated[str, Tag("[text]")] | Annotated[AssistantMessage, Tag("[message]")],
    Discriminator(lambda value: "[text]" if isinstance(value, str) else "[message]"),
]


class FeedbackRequest(RequestModel):
    """The body of POST /v1/feedback."""

    id: str
    """The answer's."""
    choice: Whole = Field(default=0, ge=0)
    correction: Correction | None = None
    """The right answer: a text, or a message of the assistant."""
    score: float | None = Field(default=None, ge=-1, le=1)
    """How good the answer is: 1 is good, -1 is bad. It trains nothing."""

    @property
    def corrected(self) -> Json | None:
        """The correction as a message of a training example; None: there is none.

        Raises ApiError (400) when nothing is said at all.
        """
        if self.correction is None:
            if self.score is None:
                raise invalid("correction", "a 'correction' or a 'score' is needed")
            return None
        if isinstance(self.correction, str):
            message: Json = {"role": "assistant", "content": self.correction}
        else:
            (message,) = as_trained([for_template(self.correction)])
        if not (message.get("content") or "").strip() and not message.get("tool_calls"):
            raise invalid("correction", "it says nothing")
        return message


class LessonObject(BaseModel):
    """Something that is learnt from a feedback."""

    kind: LessonKind
    sha256: str
    """Digest of the training example; `lemix lineage` shows it."""
    status: LessonStatus
    batch_id: str | None
    """None while it waits for others to be published with."""
    version: int | None
    """The weights version that the batch has made, or the durable one that contains it."""
    reason: str | None
    """Why it was rejected."""


class FeedbackObject(Listed):
    """A correction or rating of an answer, and what became of it."""

    object: Literal["feedback"] = "feedback"
    created_at: int
    answer_id: str
    choice: int
    score: float | None
    status: FeedbackStatus
    """`rated`: there is a score alone, of which nothing is learnt."""
    lessons: list[LessonObject]


def feedback_object(record: FeedbackRecord, lessons: Sequence[TaughtLesson]) -> FeedbackObject:
    """The feedback as it stands."""
    shown = [_lesson_object(lesson) for lesson in lessons]
    statuses = {lesson.status for lesson in shown}
    return FeedbackObject(
        id=record.id,
        created_at=record.created_at,
        answer_id=record.answer_id,
        choice=record.choice,
        score=record.score,
        status=next((each for each in _SHOWN_FIRST if each in statuses), "rated"),
        lessons=shown,
    )


def _lesson_object(lesson: TaughtLesson) -> LessonObject:
    batch, status = lesson.batch, _status_of(lesson)
    return LessonObject(
        kind=lesson.kind,
        sha256=lesson.sha256,
        status=status,
        batch_id=batch.id if batch else None,
        version=batch.version if batch and status != "held_out" else None,
        reason=(batch.reason or None) if batch else None,
    )


def _status_of(lesson: TaughtLesson) -> LessonStatus:
    status = lesson.batch.status if lesson.batch else "assigned"
    if status == "assigned" or status == "published":  # so that mypy sees what is left
        return "pending"
    is_trained = status in ("applied", "durable")
    return "held_out" if is_trained and lesson.is_held_out else status
