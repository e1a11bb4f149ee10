"""Batches of lessons in the database. All blocks; raises as the database does."""

from collections.abc import Sequence
from sqlite3 import Connection

from services.gateway.feedback.answers import LessonKind
from services.gateway.feedback.batches import Batch, BatchState, WaitingLesson, batch_of
from services.gateway.feedback.database import Database

_LESSONS = """
SELECT lessons.number, feedback_id, kind, producer, created_at, line
FROM lessons JOIN feedback ON feedback.id = feedback_id
"""


class BatchStore:
    """Which lessons a batch has stands here before it is published, and never changes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def waiting(self, kind: LessonKind, limit: int) -> list[WaitingLesson]:
        """The oldest lessons of a kind that are in no batch."""
        return self._lessons("kind = ? AND batch_id IS NULL", kind, limit=limit)

    def assign(self, lessons: Sequence[WaitingLesson]) -> None:
        """Make a batch of these lessons."""
        batch = batch_of(lessons)
        with self._database.transaction() as connection:
            connection.execute("INSERT INTO batches VALUES (?, 'assigned', 0, NULL, '')", (batch.id,))
            connection.executemany(
                "UPDATE lessons SET batch_id = ? WHERE number = ?",
                [(batch.id, lesson.number) for lesson in lessons],
            )

    def to_publish(self) -> list[Batch]:
        """The batches that are assigned and not published."""
        rows = self._database.read("SELECT id FROM batches WHERE status = 'assigned' ORDER BY rowid")
        return [batch_of(self._lessons("batch_id = ?", batch_id)) for (batch_id,) in rows]

    def states(self) -> list[BatchState]:
        """How all batches stand, oldest first."""
        query = "SELECT id, status, sequence, version, reason FROM batches ORDER BY rowid"
        return [BatchState(*row) for row in self._database.read(query)]

    def write_states(self, states: Sequence[BatchState]) -> None:
        """Note how these batches stand now. What a batch teaches is dropped once it is finished."""
        with self._database.transaction() as connection:
            for state in states:
                connection.execute(
                    "UPDATE batches SET status = ?, sequence = ?, version = ?, reason = ? WHERE id = ?",
                    (state.status, state.sequence, state.version, state.reason, state.id),
                )
                if state.status in ("applied", "durable"):
                    _write_held_out(connection, state)
                if state.is_final:
                    connection.execute("UPDATE lessons SET line = NULL WHERE batch_id = ?", (state.id,))

    def _lessons(self, condition: str, value: str, *, limit: int = -1) -> list[WaitingLesson]:
        query = f"{_LESSONS} WHERE {condition} ORDER BY lessons.number LIMIT ?"
        return [WaitingLesson(*row) for row in self._database.read(query, value, limit)]


def _write_held_out(connection: Connection, state: BatchState) -> None:
    """Note which lessons of the batch are held out; a batch that was applied anew may have others."""
    numbers = "SELECT number FROM lessons WHERE batch_id = ?"
    connection.execute(f"DELETE FROM held_out WHERE lesson IN ({numbers})", (state.id,))
    connection.executemany(
        f"INSERT INTO held_out {numbers} ORDER BY number LIMIT 1 OFFSET ?",
        [(state.id, position) for position in state.held_out],
    )
