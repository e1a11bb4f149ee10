"""Remembers answers: at once in memory, and on the disk within a second, so that no request waits for it."""

from functools import partial

from services.gateway.feedback.answer_store import AnswerLimits, AnswerStore
from services.gateway.feedback.answers import StoredAnswer
from shared.clock import Clock
from shared.disk import on_disk

MAX_UNSAVED = 1_000
"""Answers that wait for the disk, beyond which the oldest is forgotten."""


class AnswerMemory:
    """Methods that wait for the disk raise sqlite3.Error when it refuses."""

    def __init__(self, store: AnswerStore, limits: AnswerLimits, clock: Clock) -> None:
        self._store = store
        self._limits = limits
        self._clock = clock
        self._unsaved: dict[str, StoredAnswer] = {}
        """Answers that the disk does not hold yet, oldest first."""

    def keep(self, answer: StoredAnswer) -> None:
        """Remember an answer."""
        self._unsaved[answer.id] = answer
        if len(self._unsaved) > MAX_UNSAVED:
            del self._unsaved[next(iter(self._unsaved))]

    async def find(self, answer_id: str) -> StoredAnswer | None:
        """The answer of that id, if it is remembered and not too old."""
        found = self._unsaved.get(answer_id) or await on_disk(partial(self._store.find, answer_id))
        oldest_at = self._clock.wall_s() - self._limits.max_age_s
        return None if found is None or found.created_at < oldest_at else found

    async def save(self) -> None:
        """Write what is not on the disk yet."""
        unsaved = dict(self._unsaved)
        if unsaved:
            await on_disk(partial(self._store.keep, list(unsaved.values())))
        for answer_id in unsaved:
            self._unsaved.pop(answer_id, None)

    async def forget(self) -> None:
        """Forget what is beyond the limits."""
        await on_disk(partial(self._store.forget, self._limits, self._clock.wall_s()))
