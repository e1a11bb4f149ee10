"""Feedback as the API offers it: answers are remembered, corrected and rated; the publisher does the rest."""

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Self, TypeVar

from services.gateway.access.keys import Key
from services.gateway.feedback.answer_memory import AnswerMemory
from services.gateway.feedback.answer_store import AnswerLimits, AnswerStore
from services.gateway.feedback.answers import Json, Lesson, StoredAnswer, feedback_id_of, lessons_of
from services.gateway.feedback.batch_store import BatchStore
from services.gateway.feedback.database import Database
from services.gateway.feedback.feedback_store import FeedbackRecord, FeedbackStore
from services.gateway.feedback.lesson_check import faults_of
from services.gateway.feedback.objects import FeedbackObject, FeedbackRequest, feedback_object
from services.gateway.feedback.publisher import FeedbackPublisher
from services.gateway.http.errors import ApiError, rate_limited
from services.gateway.jobs.paging import ObjectList, Page, list_object
from services.gateway.openai.schema import invalid
from services.gateway.settings import GatewaySettings
from services.gateway.text.threads import TextThreads
from shared.bus.base import Bus
from shared.clock import Clock
from shared.disk import on_disk
from shared.encoding import ExampleEncoder

FILE_NAME = "feedback.sqlite"
ANONYMOUS = "anonymous"
"""The producer of feedback where there are no keys."""
MAX_OF_ANSWER = 16
"""So often something may be said about one answer."""
MAX_UNFINISHED = 10_000
"""Lessons on their way, beyond which corrections are refused (429)."""
MAX_FINISHED = 10_000
"""Feedback that is listed although it is finished and its answer is forgotten."""
SAVE_EVERY_S = 1.0
FORGET_EVERY_S = 60.0

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Parts:
    """All that works only while feedback is on."""

    database: Database
    answers: AnswerMemory
    feedback: FeedbackStore
    publisher: FeedbackPublisher

    @classmethod
    def open(cls, settings: GatewaySettings, bus: Bus, clock: Clock) -> Self:
        """Go on from what is on the disk; blocks. Raises ConfigurationError."""
        database = Database(settings.run_dir / FILE_NAME)
        limits = AnswerLimits(
            settings.feedback_max_answers, settings.feedback_max_bytes, settings.feedback_max_age_s
        )
        return cls(
            database,
            AnswerMemory(AnswerStore(database), limits, clock),
            FeedbackStore(database),
            FeedbackPublisher(settings, bus=bus, clock=clock, store=BatchStore(database)),
        )


class Feedback:
    """The answers and the feedback of one run; live inside `running()`. There are none unless it is on."""

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        bus: Bus,
        clock: Clock,
        encoder: ExampleEncoder,
        text_threads: TextThreads,
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._clock = clock
        self._encoder = encoder
        self._text_threads = text_threads
        self._parts: _Parts | None = None

    def load(self) -> None:
        """Go on from what an earlier gateway kept; blocks. Raises ConfigurationError."""
        if self._settings.feedback:
            self._parts = _Parts.open(self._settings, self._bus, self._clock)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Remember answers and publish corrections until the block ends."""
        if (parts := self._parts) is None:
            yield
            return
        async with asyncio.TaskGroup() as tasks:
            work = [tasks.create_task(parts.publisher.run()), tasks.create_task(self._tidy(parts))]
            try:
                yield
            finally:
                for task in work:
                    task.cancel()
        try:
            await parts.answers.save()
            await parts.publisher.save()
        except sqlite3.Error as error:
            log.error("feedback is not saved: %s", error)
        await on_disk(parts.database.close)

    def check_is_on(self) -> None:
        """Raises ApiError (400) for a request whose answer is to be remembered when none is."""
        if self._parts is None:
            raise invalid("store", "answers are not remembered unless LEMIX_FEEDBACK=on is set")

    def keep(self, answer: StoredAnswer) -> None:
        """Remember an answer."""
        self._working.answers.keep(answer)

    async def give(self, asked: FeedbackRequest, key: Key | None) -> FeedbackObject:
        """Take a correction or a rating by `key`. Raises ApiError."""
        parts, correction = self._working, asked.corrected
        answer = await self._answer_for(asked.id, key)
        if asked.choice >= len(answer.choices):
            raise invalid("choice", f"the answer has {len(answer.choices)}, counted from 0")
        feedback_id = feedback_id_of(answer.id, asked.choice, correction, asked.score)
        record = await _kept(on_disk(partial(parts.feedback.find, feedback_id)))
        if record is None:
            record = FeedbackRecord(
                id=feedback_id,
                key_id=key.id if key else "",
                producer=key.label if key else ANONYMOUS,
                created_at=int(self._clock.wall_s()),
                answer_id=answer.id,
                choice=asked.choice,
                score=asked.score,
            )
            lessons = await self._lessons(answer, asked.choice, correction) if correction else []
            await self._check_room(answer.id, len(lessons))
            await _kept(on_disk(partial(parts.feedback.add, record, lessons)))
            parts.publisher.changed.set()
        return (await self._shown([record]))[0]

    async def list_feedback(self, page: Page, key: Key | None) -> ObjectList[FeedbackObject]:
        """The feedback of a key, the newest first; all where there are no keys. Raises ApiError."""
        store, key_id = self._working.feedback, key.id if key else None
        if page.after is not None:
            before = await _kept(on_disk(partial(store.find, page.after)))
            if before is None or key_id not in (None, before.key_id):
                raise invalid("after", f"there is no {page.after!r} in this list")
        find = partial(store.newest, key_id, before=page.after, limit=page.limit + 1)
        records = await _kept(on_disk(find))
        shown = await self._shown(records[: page.limit])
        return list_object(shown, has_more=len(records) > page.limit)

    async def _shown(self, records: Sequence[FeedbackRecord]) -> list[FeedbackObject]:
        ids = [record.id for record in records]
        lessons = await _kept(on_disk(partial(self._working.feedback.lessons_of, ids)))
        return [feedback_object(record, lessons[record.id]) for record in records]

    @property
    def _working(self) -> _Parts:
        """Raises ApiError (404) when feedback is off."""
        if self._parts is None:
            message = "this server takes no feedback: LEMIX_FEEDBACK=on is not set"
            raise ApiError(404, message, code="feedback_is_off")
        return self._parts

    async def _answer_for(self, answer_id: str, key: Key | None) -> StoredAnswer:
        """Raises ApiError (404) for one that is not remembered, or not the key's business."""
        answer = await _kept(self._working.answers.find(answer_id))
        if answer is None or not _may_judge(key, answer):
            message = f"no answer {answer_id!r} of this key is remembered (ask with 'store': true)"
            raise ApiError(404, message, param="id", code="answer_not_found")
        return answer

    async def _lessons(self, answer: StoredAnswer, choice: int, correction: Json) -> list[Lesson]:
        """The lessons of a correction. A pair may be too long where the correction alone is not.

        Raises ApiError (400) naming the correction when nothing can be learnt from it.
        """
        if correction == answer.choices[choice]:
            raise invalid("correction", "it is the answer itself; give a 'score' to rate that")
        if answer.prompts and set(correction) != {"role", "content"}:
            raise invalid("correction", "a completion is corrected by a text")
        lessons = lessons_of(answer, choice, correction)
        size = sum(len(lesson.line) for lesson in lessons)
        check = partial(faults_of, lessons, self._encoder, self._bus.max_message_bytes)
        of_example, *of_pair = await self._text_threads.run(size, check)
        if of_example:
            raise invalid("correction", of_example)
        return [lesson for lesson, fault in zip(lessons, ["", *of_pair], strict=True) if not fault]

    async def _check_room(self, answer_id: str, num_lessons: int) -> None:
        """Raises ApiError when too much is on its way, or was said about this answer."""
        store = self._working.feedback
        if await _kept(on_disk(partial(store.num_of_answer, answer_id))) >= MAX_OF_ANSWER:
            raise invalid("id", f"{MAX_OF_ANSWER} feedbacks on one answer are taken at most")
        if num_lessons and await _kept(on_disk(store.num_unfinished)) + num_lessons > MAX_UNFINISHED:
            raise rate_limited(f"{MAX_UNFINISHED} corrections are on their way already")

    async def _tidy(self, parts: _Parts) -> None:
        """Save answers, and forget what is old, for ever."""
        forget_at_s = self._clock.now_s()
        while True:
            try:
                await parts.answers.save()
                if self._clock.now_s() >= forget_at_s:
                    forget_at_s = self._clock.now_s() + FORGET_EVERY_S
                    await parts.answers.forget()
                    await on_disk(partial(parts.feedback.forget, MAX_FINISHED))
            except sqlite3.Error as error:
                log.error("answers are not saved yet: %s", error)
            await asyncio.sleep(SAVE_EVERY_S)


async def _kept(work: Awaitable[T]) -> T:
    """The result of work on the disk. Raises ApiError (503) when it refuses."""
    try:
        return await work
    except sqlite3.Error as error:
        raise ApiError(503, f"feedback cannot be kept: {error}") from error


def _may_judge(key: Key | None, answer: StoredAnswer) -> bool:
    """The key that asked may, and whoever may train the model anyway."""
    return key is None or key.id == answer.key_id or key.allows("train")
