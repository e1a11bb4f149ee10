"""The SQLite file that holds answers and feedback, and outlives the gateway. All blocks."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

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
CREATE INDEX IF NOT EXISTS feedback_by_answer ON feedback (answer_id);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, status TEXT NOT NULL, sequence INTEGER NOT NULL, version INTEGER,
    reason TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS lessons (
    number INTEGER PRIMARY KEY AUTOINCREMENT, feedback_id TEXT NOT NULL, kind TEXT NOT NULL,
    sha256 TEXT NOT NULL, line BLOB, batch_id TEXT, UNIQUE (feedback_id, kind)
);
CREATE INDEX IF NOT EXISTS lessons_by_batch ON lessons (batch_id);
CREATE TABLE IF NOT EXISTS held_out (lesson INTEGER PRIMARY KEY);
"""
"""`lessons.line` is dropped once the lesson is finished. `held_out` has the numbers of the lessons that train
nothing although their batch does.
"""


class Database:
    """One connection, used by one thread at a time. All methods raise sqlite3.Error when the disk refuses."""

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

    def read(self, query: str, *values: object) -> list[Any]:
        """All rows that a query finds."""
        with self._lock, closing(self._connection.execute(query, values)) as cursor:
            return cursor.fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block is written, or nothing."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite ends it by itself after some errors
                    self._connection.execute("ROLLBACK")
                raise
