"""Remembered answers in the database. All blocks; raises as the database does."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.feedback.answers import StoredAnswer
from services.gateway.feedback.database import Database


@dataclass(frozen=True, slots=True)
class AnswerLimits:
    """Older answers are forgotten beyond these."""

    max_answers: int
    max_bytes: int
    max_age_s: float


class AnswerStore:
    """Answers by their ids."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def keep(self, answers: Sequence[StoredAnswer]) -> None:
        """Remember these answers."""
        contents = [(each, each.model_dump_json()) for each in answers]
        with self._database.transaction() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)",
                [(each.id, each.created_at, len(content.encode()), content) for each, content in contents],
            )

    def find(self, answer_id: str) -> StoredAnswer | None:
        """The answer of that id, if it is remembered."""
        rows = self._database.read("SELECT content FROM answers WHERE id = ?", answer_id)
        return StoredAnswer.model_validate_json(rows[0][0]) if rows else None

    def forget(self, limits: AnswerLimits, now_s: float) -> None:
        """Forget answers that are too old, and the oldest ones beyond the limits."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM answers WHERE created_at < ?", (now_s - limits.max_age_s,))
            connection.execute(
                "DELETE FROM answers WHERE id IN (SELECT id FROM (SELECT id, "
                "ROW_NUMBER() OVER newest AS place, SUM(num_bytes) OVER newest AS total FROM answers "
                "WINDOW newest AS (ORDER BY created_at DESC, rowid DESC)) WHERE place > ? OR total > ?)",
                (limits.max_answers, limits.max_bytes),
            )
