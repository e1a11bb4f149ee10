"""Feedback and its lessons in the database. All blocks; raises as the database does."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from services.gateway.feedback.answers import Lesson, LessonKind
from services.gateway.feedback.batches import BatchState
from services.gateway.feedback.database import Database

_COLUMNS = "id, key_id, producer, created_at, answer_id, choice, score"
_LESSONS = """
SELECT feedback_id, kind, sha256, lesson IS NOT NULL, batch_id, status, sequence, version, reason
FROM lessons LEFT JOIN batches ON batches.id = batch_id LEFT JOIN held_out ON lesson = number
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackRecord:
    """A correction or rating of one choice of an answer; its fields are the columns."""

    id: str
    key_id: str
    """Who has said it; empty: there were no keys."""
    producer: str
    """The same, for people."""
    created_at: int
    answer_id: str
    choice: int
    score: float | None


@dataclass(frozen=True, slots=True)
class TaughtLesson:
    """A lesson of a feedback, and what became of it."""

    kind: LessonKind
    sha256: str
    batch: BatchState | None
    """None: it waits for others."""
    is_held_out: bool
    """It trains nothing, whatever the others of its batch do."""


class FeedbackStore:
    """Feedback by its ids, in the order of its arrival."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, record: FeedbackRecord, lessons: Sequence[Lesson]) -> None:
        """Keep a feedback with its lessons; one that is there already stays as it is."""
        with self._database.transaction() as connection:
            added = connection.execute(
                f"INSERT OR IGNORE INTO feedback ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", astuple(record)
            )
            if added.rowcount:
                connection.executemany(
                    "INSERT INTO lessons (feedback_id, kind, sha256, line) VALUES (?, ?, ?, ?)",
                    [(record.id, each.kind, each.sha256, each.line) for each in lessons],
                )

    def find(self, feedback_id: str) -> FeedbackRecord | None:
        """The feedback of that id."""
        rows = self._database.read(f"SELECT {_COLUMNS} FROM feedback WHERE id = ?", feedback_id)
        return _record(rows[0]) if rows else None

    def newest(self, key_id: str | None, *, before: str | None, limit: int) -> list[FeedbackRecord]:
        """The newest first, older than the feedback `before`; `key_id`: of that key alone."""
        rows = self._database.read(
            f"SELECT {_COLUMNS} FROM feedback WHERE (? IS NULL OR key_id = ?) AND "
            "(? IS NULL OR number < (SELECT number FROM feedback WHERE id = ?)) ORDER BY number DESC LIMIT ?",
            key_id,
            key_id,
            before,
            before,
            limit,
        )
        return [_record(row) for row in rows]

    def lessons_of(self, feedback_ids: Sequence[str]) -> dict[str, list[TaughtLesson]]:
        """The lessons of each feedback, in their order."""
        marks = ", ".join("?" * len(feedback_ids))
        query = f"{_LESSONS} WHERE feedback_id IN ({marks}) ORDER BY lessons.number"
        found: dict[str, list[TaughtLesson]] = {each: [] for each in feedback_ids}
        rows = self._database.read(query, *feedback_ids)
        for feedback_id, kind, sha256, is_held_out, batch_id, *state in rows:
            batch = None if batch_id is None else BatchState(batch_id, *state)
            found[feedback_id].append(TaughtLesson(kind, sha256, batch, bool(is_held_out)))
        return found

    def num_unfinished(self) -> int:
        """Lessons that are neither learnt for good nor given up."""
        return self._count("lessons WHERE line IS NOT NULL")

    def num_of_answer(self, answer_id: str) -> int:
        """How often something was said about an answer."""
        return self._count("feedback WHERE answer_id = ?", answer_id)

    def forget(self, max_kept: int) -> None:
        """Forget the oldest feedback beyond so many, once it is finished and its answer is forgotten: then
        nobody can send it again.
        """
        with self._database.transaction() as connection:
            connection.execute(
                "DELETE FROM feedback WHERE number <= (SELECT MAX(number) FROM feedback) - ? "
                "AND answer_id NOT IN (SELECT id FROM answers) "
                "AND id NOT IN (SELECT feedback_id FROM lessons WHERE line IS NOT NULL)",
                (max_kept,),
            )
            connection.execute("DELETE FROM lessons WHERE feedback_id NOT IN (SELECT id FROM feedback)")
            connection.execute("DELETE FROM held_out WHERE lesson NOT IN (SELECT number FROM lessons)")
            connection.execute(
                "DELETE FROM batches WHERE id NOT IN "
                "(SELECT batch_id FROM lessons WHERE batch_id IS NOT NULL)"
            )

    def _count(self, what: str, *values: object) -> int:
        return int(self._database.read(f"SELECT COUNT(*) FROM {what}", *values)[0][0])


def _record(row: Sequence[Any]) -> FeedbackRecord:
    return FeedbackRecord(**dict(zip(_COLUMNS.split(", "), row, strict=True)))
