"""Answers, feedback, lessons and batches in an SQLite file, which outlives the gateway. All blocks."""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.gateway.feedback.answers import Lesson, LessonKind, StoredAnswer
from services.gateway.feedback.batches import Batch, BatchState, WaitingLesson, batch_of
from shared.errors import ConfigurationError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    id TEXT PRIMARY KEY, created_at INTEGER NOT NULL, num_bytes INTEGER NOT NULL, content TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS answers_by_age ON answers (created_at);
CREATE TABLE IF NOT EXISTS feedback (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, key_id TEXT NOT NULL,
    producer TEXT NOT NULL, created_at INTEGER NOT NULL, answer_id TEXT NOT NULL, choice INTEGER NOT NULL,
    score REAL
);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, status TEXT NOT NULL, sequence INTEGER NOT NULL, version INTEGER,
    reason TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS lessons (
    number INTEGER PRIMARY KEY AUTOINCREMENT, feedback_id TEXT NOT NULL, kind TEXT NOT NULL,
    sha256 TEXT NOT NULL, line BLOB, batch_id TEXT, UNIQUE (feedback_id, kind)
);
CREATE INDEX IF NOT EXISTS lessons_by_batch ON lessons (batch_id);
"""
_LESSONS = """
SELECT lessons.number, feedback_id, kind, producer, created_at, line
FROM lessons JOIN feedback ON feedback.id = feedback_id
"""
_TAUGHT = """
SELECT feedback_id, kind, sha256, batch_id, status, sequence, version, reason
FROM lessons LEFT JOIN batches ON batches.id = batch_id
"""


@dataclass(frozen=True, slots=True)
class AnswerLimits:
    """Older answers are forgotten beyond these."""

    max_answers: int
    max_bytes: int
    max_age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackRecord:
    """A correction or rating of one choice of an answer."""

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


class FeedbackStore:
    """One connection, used by one thread at a time. Raises sqlite3.Error when the disk refuses."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it. Raises ConfigurationError when it cannot be used."""
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # conversations are private
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute("PRAGMA secure_delete=ON")
            self._connection.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigurationError(f"{path} cannot hold feedback: {error}") from error

    def close(self) -> None:
        """Leave the file."""
        with self._lock:
            self._connection.close()

    # Answers

    def keep_answers(self, answers: Sequence[StoredAnswer]) -> None:
        """Remember these answers."""
        rows = [(each.id, each.created_at, each.model_dump_json()) for each in answers]
        with self._transaction():
            self._connection.executemany(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)",
                [(answer_id, at, len(content.encode()), content) for answer_id, at, content in rows],
            )

    def find_answer(self, answer_id: str) -> StoredAnswer | None:
        """The answer of that id, if it is remembered."""
        rows = self._read("SELECT content FROM answers WHERE id = ?", answer_id)
        return StoredAnswer.model_validate_json(rows[0][0]) if rows else None

    def forget_answers(self, limits: AnswerLimits, now_s: float) -> None:
        """Forget answers that are too old, and the oldest ones beyond the limits."""
        oldest_at = now_s - limits.max_age_s
        with self._transaction():
            self._connection.execute("DELETE FROM answers WHERE created_at < ?", (oldest_at,))
            self._connection.execute(
                "DELETE FROM answers WHERE id IN (SELECT id FROM (SELECT id, "
                "ROW_NUMBER() OVER newest AS place, SUM(num_bytes) OVER newest AS total FROM answers "
                "WINDOW newest AS (ORDER BY created_at DESC, rowid DESC)) WHERE place > ? OR total > ?)",
                (limits.max_answers, limits.max_bytes),
            )

    # Feedback

    def add_feedback(self, record: FeedbackRecord, lessons: Sequence[Lesson]) -> None:
        """Keep a feedback with its lessons; one that is there already stays as it is."""
        with self._transaction():
            added = self._connection.execute(
                "INSERT OR IGNORE INTO feedback (id, key_id, producer, created_at, answer_id, choice, score) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    record.id,
                    record.key_id,
                    record.producer,
                    record.created_at,
                    record.answer_id,
                    record.choice,
                    record.score,
                ),
            )
            if added.rowcount:
                self._connection.executemany(
                    "INSERT INTO lessons (feedback_id, kind, sha256, line) VALUES (?, ?, ?, ?)",
                    [(record.id, each.kind, each.sha256, each.line) for each in lessons],
                )

    def find_feedback(self, feedback_id: str) -> FeedbackRecord | None:
        """The feedback of that id."""
        rows = self._read(f"SELECT {_COLUMNS} FROM feedback WHERE id = ?", feedback_id)
        return _record(rows[0]) if rows else None

    def list_feedback(self, key_id: str | None, *, before: str | None, limit: int) -> list[FeedbackRecord]:
        """The newest first, older than the feedback `before`; `key_id`: of that key alone."""
        rows = self._read(
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
        rows = self._read(f"{_TAUGHT} WHERE feedback_id IN ({marks}) ORDER BY lessons.number", *feedback_ids)
        found: dict[str, list[TaughtLesson]] = {each: [] for each in feedback_ids}
        for feedback_id, kind, sha256, batch_id, *state in rows:
            batch = BatchState(batch_id, *state) if batch_id is not None else None
            found[feedback_id].append(TaughtLesson(kind, sha256, batch))
        return found

    def num_unfinished(self) -> int:
        """Lessons that are not in durable weights, nor rejected."""
        return int(self._read("SELECT COUNT(*) FROM lessons WHERE line IS NOT NULL")[0][0])

    def num_of_answer(self, answer_id: str) -> int:
        """How often something was said about an answer."""
        return int(self._read("SELECT COUNT(*) FROM feedback WHERE answer_id = ?", answer_id)[0][0])

    def forget_feedback(self, max_kept: int) -> None:
        """Forget the oldest feedback beyond so many, once it is finished and its answer is forgotten: then
        nobody can send it again.
        """
        with self._transaction():
            self._connection.execute(
                "DELETE FROM feedback WHERE number <= (SELECT MAX(number) FROM feedback) - ? "
                "AND answer_id NOT IN (SELECT id FROM answers) "
                "AND id NOT IN (SELECT feedback_id FROM lessons WHERE line IS NOT NULL)",
                (max_kept,),
            )
            self._connection.execute("DELETE FROM lessons WHERE feedback_id NOT IN (SELECT id FROM feedback)")
            self._connection.execute(
                "DELETE FROM batches WHERE id NOT IN "
                "(SELECT batch_id FROM lessons WHERE batch_id IS NOT NULL)"
            )

    # Batches

    def waiting_lessons(self, kind: LessonKind, limit: int) -> list[WaitingLesson]:
        """The oldest lessons of a kind that are in no batch."""
        rows = self._read(
            f"{_LESSONS} WHERE kind = ? AND batch_id IS NULL ORDER BY lessons.number LIMIT ?", kind, limit
        )
        return [WaitingLesson(*row) for row in rows]

    def assign(self, lessons: Sequence[WaitingLesson]) -> None:
        """Make a batch of these lessons; from now on it has these and no others."""
        batch = batch_of(lessons)
        with self._transaction():
            self._connection.execute("INSERT INTO batches VALUES (?, 'assigned', 0, NULL, '')", (batch.id,))
            self._connection.executemany(
                "UPDATE lessons SET batch_id = ? WHERE number = ?",
                [(batch.id, lesson.number) for lesson in lessons],
            )

    def batches_to_publish(self) -> list[Batch]:
        """The batches that are assigned and not published."""
        rows = self._read("SELECT id FROM batches WHERE status = 'assigned' ORDER BY rowid")
        return [batch_of(self._lessons_in(batch_id)) for (batch_id,) in rows]

    def batches(self) -> list[BatchState]:
        """How all batches stand, oldest first."""
        rows = self._read("SELECT id, status, sequence, version, reason FROM batches ORDER BY rowid")
        return [BatchState(*row) for row in rows]

    def write_states(self, states: Sequence[BatchState]) -> None:
        """Note how these batches stand now. What a batch taught is dropped once it is finished."""
        with self._transaction():
            for state in states:
                self._connection.execute(
                    "UPDATE batches SET status = ?, sequence = ?, version = ?, reason = ? WHERE id = ?",
                    (state.status, state.sequence, state.version, state.reason, state.id),
                )
                if state.is_final:
                    self._connection.execute("UPDATE lessons SET line = NULL WHERE batch_id = ?", (state.id,))

    def _lessons_in(self, batch_id: str) -> list[WaitingLesson]:
        rows = self._read(f"{_LESSONS} WHERE batch_id = ? ORDER BY lessons.number", batch_id)
        return [WaitingLesson(*row) for row in rows]

    def _read(self, query: str, *values: object) -> list[Any]:
        with self._lock, closing(self._connection.execute(query, values)) as cursor:
            return cursor.fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of the block is written, or nothing."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")


_COLUMNS = "id, key_id, producer, created_at, answer_id, choice, score"


def _record(row: Sequence[Any]) -> FeedbackRecord:
    return FeedbackRecord(**dict(zip(_COLUMNS.split(", "), row, strict=True)))
