"""Feedback as the API offers it: answers are remembered, corrected and rated; the publisher does the rest."""

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from services.gateway.access.keys import Key
from services.gateway.feedback.answers import Lesson, StoredAnswer, feedback_id_of, lessons_of
from services.gateway.feedback.batches import ENVELOPE_BYTES, SOURCE_BYTES
from services.gateway.feedback.objects import FeedbackObject, FeedbackRequest, feedback_object
from services.gateway.feedback.publisher import FeedbackPublisher
from services.gateway.feedback.store import AnswerLimits, FeedbackRecord, FeedbackStore
from services.gateway.http.errors import ApiError
from services.gateway.jobs.paging import ObjectList, Page, list_object
from services.gateway.openai.schema import invalid
from services.gateway.settings import GatewaySettings
from services.gateway.text.threads import TextThreads
from shared.bus.base import Bus
from shared.clock import Clock
from shared.disk import on_disk
from shared.encoding import ExampleEncoder
from shared.errors import InvalidBatchError
from shared.examples import read_example

FILE_NAME = "feedback.sqlite"
ANONYMOUS = "anonymous"
"""The producer of feedback where there are no keys."""
MAX_OF_ANSWER = 16
"""So often something may be said about one answer."""
MAX_UNFINISHED = 10_000
"""Lessons on their way, beyond which corrections are refused (429)."""
MAX_UNSAVED = 1_000
"""Answers that wait for the disk, beyond which the oldest is forgotten."""
MAX_FINISHED = 10_000
"""Feedback that is listed although it is finished and its answer is forgotten."""
TIDY_EVERY_S = 60.0
SAVE_EVERY_S = 1.0

T = TypeVar("T")

log = logging.getLogger(__name__)


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
        self._store: FeedbackStore | None = None
        self._publisher: FeedbackPublisher | None = None
        self._unsaved: dict[str, StoredAnswer] = {}
        """Answers that the disk does not hold yet, oldest first."""

    def load(self) -> None:
        """Go on from what an earlier gateway kept; blocks. Raises ConfigurationError."""
        if self._settings.feedback:
            self._store = FeedbackStore(self._settings.run_dir / FILE_NAME)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Remember answers and publish corrections until the block ends."""
        if self._store is None:
            yield
            return
        publisher = FeedbackPublisher(self._settings, bus=self._bus, clock=self._clock, store=self._store)
        self._publisher = publisher
        async with asyncio.TaskGroup() as tasks:
            work = [tasks.create_task(publisher.run()), tasks.create_task(self._tidy(self._store))]
            try:
                yield
            finally:
                for task in work:
                    task.cancel()
        await self._end(self._store, publisher)

    def check_is_on(self) -> None:
        """Raises ApiError (400) for a request whose answer is to be remembered when none is."""
        if self._store is None:
            raise invalid("store", "answers are not remembered unless LEMIX_FEEDBACK=on is set")

    def keep(self, answer: StoredAnswer) -> None:
        """Remember an answer: at once, and on the disk within a second."""
        self._unsaved[answer.id] = answer
        if len(self._unsaved) > MAX_UNSAVED:
            del self._unsaved[next(iter(self._unsaved))]

    async def give(self, asked: FeedbackRequest, key: Key | None) -> FeedbackObject:
        """Take a correction or a rating by `key`. Raises ApiError."""
        store = self._open_store()
        correction = asked.corrected
        answer = await self._find_answer(store, asked.id, key)
        if asked.choice >= len(answer.choices):
            raise invalid("choice", f"the answer has {len(answer.choices)}, counted from 0")
        feedback_id = feedback_id_of(answer.id, asked.choice, correction, asked.score)
        if await self._ask_store(partial(store.find_feedback, feedback_id)) is None:
            lessons = await self._lessons(answer, asked.choice, correction) if correction else []
            await self._check_room(store, answer.id, num_lessons=len(lessons))
            record = FeedbackRecord(
                id=feedback_id,
                key_id=key.id if key else "",
                producer=key.label if key else ANONYMOUS,
                created_at=int(self._clock.wall_s()),
                answer_id=answer.id,
                choice=asked.choice,
                score=asked.score,
            )
            await self._ask_store(partial(store.add_feedback, record, lessons))
            assert self._publisher is not None, "the routes live as long as it does"
            self._publisher.changed.set()
        found = await self._ask_store(partial(store.find_feedback, feedback_id))
        assert found is not None, "it has just been added"
        return (await self._shown(store, [found]))[0]

    async def list_feedback(self, page: Page, key: Key | None) -> ObjectList[FeedbackObject]:
        """The feedback of a key, the newest first; all where there are no keys. Raises ApiError."""
        store = self._open_store()
        key_id = key.id if key else None
        if page.after is not None:
            before = await self._ask_store(partial(store.find_feedback, page.after))
            if before is None or key_id not in (None, before.key_id):
                raise invalid("after", f"there is no {page.after!r} in this list")
        ask = partial(store.list_feedback, key_id, before=page.after, limit=page.limit + 1)
        records = await self._ask_store(ask)
        shown = await self._shown(store, records[: page.limit])
        return list_object(shown, has_more=len(records) > page.limit)

    async def _shown(self, store: FeedbackStore, records: Sequence[FeedbackRecord]) -> list[FeedbackObject]:
        lessons = await self._ask_store(partial(store.lessons_of, [record.id for record in records]))
        return [feedback_object(record, lessons[record.id]) for record in records]

    def _open_store(self) -> FeedbackStore:
        if self._store is None:
            message = "this server takes no feedback: LEMIX_FEEDBACK=on is not set"
            raise ApiError(404, message, code="feedback_is_off")
        return self._store

    async def _find_answer(self, store: FeedbackStore, answer_id: str, key: Key | None) -> StoredAnswer:
        """Raises ApiError (404) for one that is not remembered, or not the key's business."""
        answer = self._unsaved.get(answer_id) or await self._ask_store(partial(store.find_answer, answer_id))
        oldest_at = self._clock.wall_s() - self._settings.feedback_max_age_s
        if answer is not None and answer.created_at >= oldest_at and _may_judge(key, answer):
            return answer
        message = f"no answer {answer_id!r} of this key is remembered (ask with 'store': true)"
        raise ApiError(404, message, param="id", code="answer_not_found")

    async def _lessons(
        self, answer: StoredAnswer, choice: int, correction: Mapping[str, Any]
    ) -> list[Lesson]:
        """The lessons of a correction. A pair may be too long where the correction alone is not.

        Raises ApiError (400) naming the correction when nothing can be learnt from it.
        """
        if correction == answer.choices[choice]:
            raise invalid("correction", "it is the answer itself; give a 'score' to rate that")
        if answer.prompts and set(correction) != {"role", "content"}:
            raise invalid("correction", "a completion is corrected by a text")
        lessons = lessons_of(answer, choice, correction)
        size = sum(len(lesson.line) for lesson in lessons)
        example, *pair = await self._text_threads.run(size, partial(self._faults, lessons))
        if example:
            raise invalid("correction", example)
        return [lesson for lesson, fault in zip(lessons, ["", *pair], strict=True) if not fault]

    def _faults(self, lessons: Sequence[Lesson]) -> list[str]:
        """Why each of these cannot be learnt from; empty where it can. Blocks while it tokenises."""
        return [self._fault(lesson) for lesson in lessons]

    def _fault(self, lesson: Lesson) -> str:
        room = self._bus.max_message_bytes - ENVELOPE_BYTES - SOURCE_BYTES
        if len(lesson.line) > room:
            return f"has {len(lesson.line)} bytes with its conversation, at most {room} can be learnt at once"
        try:
            self._encoder.sequences(read_example(lesson.line))
        except InvalidBatchError as error:
            return str(error)
        except Exception as error:  # a tokenizer or template may raise anything
            log.exception("a correction cannot be encoded")
            return f"{type(error).__name__}: {error}"
        return ""

    async def _check_room(self, store: FeedbackStore, answer_id: str, *, num_lessons: int) -> None:
        """Raises ApiError when too much is on its way, or was said about this answer."""
        if await self._ask_store(partial(store.num_of_answer, answer_id)) >= MAX_OF_ANSWER:
            raise invalid("id", f"{MAX_OF_ANSWER} feedbacks on one answer are taken at most")
        if num_lessons and await self._ask_store(store.num_unfinished) + num_lessons > MAX_UNFINISHED:
            message = f"{MAX_UNFINISHED} corrections are on their way already"
            raise ApiError(429, message, code="rate_limit_exceeded")

    async def _ask_store(self, work: Callable[[], T]) -> T:
        """Raises ApiError (503) when the disk refuses."""
        try:
            return await on_disk(work)
        except sqlite3.Error as error:
            raise ApiError(503, f"feedback cannot be kept: {error}") from error

    async def _tidy(self, store: FeedbackStore) -> None:
        """Save answers, and forget old ones, for ever."""
        limits = AnswerLimits(
            self._settings.feedback_max_answers,
            self._settings.feedback_max_bytes,
            self._settings.feedback_max_age_s,
        )
        tidied_at_s = -TIDY_EVERY_S
        while True:
            try:
                await self._save(store)
                if self._clock.now_s() - tidied_at_s >= TIDY_EVERY_S:
                    tidied_at_s = self._clock.now_s()
                    await on_disk(partial(store.forget_answers, limits, self._clock.wall_s()))
                    await on_disk(partial(store.forget_feedback, MAX_FINISHED))
            except sqlite3.Error as error:
                log.error("answers are not saved yet: %s", error)
            await asyncio.sleep(SAVE_EVERY_S)

    async def _save(self, store: FeedbackStore) -> None:
        unsaved = dict(self._unsaved)
        if unsaved:
            await on_disk(partial(store.keep_answers, list(unsaved.values())))
        for answer_id in unsaved:
            self._unsaved.pop(answer_id, None)

    async def _end(self, store: FeedbackStore, publisher: FeedbackPublisher) -> None:
        """Have the disk hold how all stands."""
        try:
            await self._save(store)
            await publisher.save()
        except sqlite3.Error as error:
            log.error("feedback is not saved: %s", error)
        await on_disk(store.close)


def _may_judge(key: Key | None, answer: StoredAnswer) -> bool:
    """The key that asked may, and whoever may train the model anyway."""
    return key is None or key.id == answer.key_id or key.allows("train")
