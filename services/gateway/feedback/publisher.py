"""Publishes corrections as training batches, each once, and follows what becomes of them."""

import asyncio
import logging
import math
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import get_args

from services.gateway.feedback.answers import LessonKind
from services.gateway.feedback.batch_store import BatchStore
from services.gateway.feedback.batches import (
    Batch,
    BatchState,
    after,
    after_unknown,
    due,
    newest_durable,
)
from services.gateway.settings import GatewaySettings
from shared.bus.base import Bus, Incoming
from shared.clock import Clock
from shared.disk import on_disk
from shared.errors import BusError, MessageTooLargeError
from shared.messages.training import (
    MAX_BATCHES_OF_MESSAGE,
    BatchDurable,
    BatchesAsked,
    BatchEvent,
    BatchProgress,
    BatchRejected,
)
from shared.subjects import BATCHES, TRAIN_PROGRESS, TRAIN_STATUS

LOOK_EVERY_S = 1.0
"""How often to look what is to be done when nothing happens."""
ASK_TIMEOUT_S = 2.0
ASK_DURABLE_EVERY_S = 60.0
"""How often to ask for the newest durable batches: the news of a rollback may have been lost."""
MAX_KNOWN = 10_000
"""Batches of which news are heard; of older ones that are finished a rollback is no longer told."""

log = logging.getLogger(__name__)


class FeedbackPublisher:
    """One loop. A batch is in the file before it is published, under an id made of its content: so whatever
    dies, the trainer takes it once.
    """

    def __init__(self, settings: GatewaySettings, *, bus: Bus, clock: Clock, store: BatchStore) -> None:
        self._settings = settings
        self._bus = bus
        self._clock = clock
        self._store = store
        self._states: dict[str, BatchState] = {}
        self._unsaved: set[str] = set()
        """Batches that stand otherwise than the file says."""
        self._heard_at_s = -math.inf
        """When something was heard of any batch, or asked."""
        self._asked_durable_at_s = -math.inf
        self.changed = asyncio.Event()
        """There is a new correction, or news of a batch."""

    async def run(self) -> None:
        """Work until cancelled. Raises BusError when the bus cannot be listened to."""
        self._states = {state.id: state for state in await on_disk(self._store.states)}
        subscription = await self._bus.subscribe(TRAIN_PROGRESS.at(), self._on_progress)
        try:
            await self._ask(self._states)  # what happened while there was no gateway: also rollbacks
            while True:
                self.changed.clear()
                await self._look()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await self.changed.wait()
        finally:
            await subscription.unsubscribe()

    async def save(self) -> None:
        """Write down how batches stand. Raises sqlite3.Error; then it is tried again at the next call."""
        unsaved, self._unsaved = self._unsaved, set()
        try:
            await on_disk(partial(self._store.write_states, [self._states[each] for each in unsaved]))
        except BaseException:
            self._unsaved |= unsaved
            raise

    async def _look(self) -> None:
        try:
            for kind in get_args(LessonKind):
                await self._make_batches(kind)
            await self._publish()
            await self._ask_after_silence()
            await self._ask_durable()
            if self._unsaved:
                await self.save()
            if len(self._states) > MAX_KNOWN and not self._unsaved:
                self._forget_oldest()
        except sqlite3.Error as error:
            log.error("feedback is not published yet: %s", error)

    async def _make_batches(self, kind: LessonKind) -> None:
        settings = self._settings
        while True:
            size = settings.feedback_batch_size
            lessons = due(
                await on_disk(partial(self._store.waiting, kind, size)),
                now_s=self._clock.wall_s(),
                size=size,
                after_s=settings.feedback_batch_after_s,
                max_bytes=self._bus.max_message_bytes,
            )
            if not lessons:
                return
            await on_disk(partial(self._store.assign, lessons))

    async def _publish(self) -> None:
        """Publish what is assigned; if the bus refuses it for now, it is tried again at the next look."""
        for batch in await on_disk(self._store.to_publish):
            state = self._states.setdefault(batch.id, BatchState(batch.id, "assigned"))
            if state.status == "assigned" and not await self._publish_batch(batch):
                return
        if self._unsaved:
            await self.save()

    async def _publish_batch(self, batch: Batch) -> bool:
        """Publish a batch, or reject one that can never be published. False: it must be tried again."""
        try:
            stored = await self._bus.publish_durable(BATCHES, batch.body, message_id=batch.id)
        except MessageTooLargeError as error:
            log.error("feedback %s is rejected: %s", batch.id, error)
            self._happen(BatchRejected(batch_id=batch.id, reason=str(error)))
            return True
        except BusError as error:
            log.warning("feedback %s is not stored yet: %s", batch.id, error)
            return False
        state = self._states[batch.id]
        if state.status == "assigned":  # else its events have overtaken the answer
            self._note(BatchState(batch.id, "published", stored.sequence))
        return True

    async def _ask_after_silence(self) -> None:
        """Ask the trainer for batches that are on their way when nothing was heard of any for a while."""
        under_way = [state.id for state in self._states.values() if not state.is_final]
        if under_way and self._clock.now_s() - self._heard_at_s >= self._settings.ask_after_s:
            await self._ask(under_way)

    async def _ask_durable(self) -> None:
        """Ask now and then whether the newest durable batches are still in the weights."""
        now_s = self._clock.now_s()
        if now_s - self._asked_durable_at_s < ASK_DURABLE_EVERY_S:
            return
        self._asked_durable_at_s = now_s
        if newest := newest_durable(self._states.values(), MAX_BATCHES_OF_MESSAGE):
            await self._ask_some(newest)

    async def _ask(self, batch_ids: Iterable[str]) -> None:
        self._heard_at_s = self._clock.now_s()
        ids = list(batch_ids)
        for start in range(0, len(ids), MAX_BATCHES_OF_MESSAGE):
            if not await self._ask_some(ids[start : start + MAX_BATCHES_OF_MESSAGE]):
                return

    async def _ask_some(self, batch_ids: Sequence[str]) -> bool:
        asked = BatchesAsked(batch_ids=tuple(batch_ids))
        try:
            now = await self._bus.request(TRAIN_STATUS.at(), asked, timeout_s=ASK_TIMEOUT_S)
        except BusError as error:
            log.info("the trainer does not say how feedback stands: %s", error)
            return False
        for event in now.events:
            self._happen(event)
        for batch_id in now.unknown:
            self._note(after_unknown(self._states[batch_id], now.read_up_to))
        return True

    async def _on_progress(self, incoming: Incoming[BatchProgress]) -> None:
        if self._happen(incoming.message.event):
            self._heard_at_s = self._clock.now_s()
            self.changed.set()

    def _happen(self, event: BatchEvent) -> bool:
        """Whether the event is of a batch of feedback."""
        ids = event.batch_ids if isinstance(event, BatchDurable) else (event.batch_id,)
        known = [batch_id for batch_id in ids if batch_id in self._states]
        for batch_id in known:
            self._note(after(self._states[batch_id], event))
        return bool(known)

    def _note(self, state: BatchState) -> None:
        if self._states[state.id] != state:
            self._states[state.id] = state
            self._unsaved.add(state.id)

    def _forget_oldest(self) -> None:
        """Forget finished batches beyond those that are known, once the file has how they stand."""
        finished = (state.id for state in list(self._states.values()) if state.is_final)
        for batch_id in islice(finished, max(0, len(self._states) - MAX_KNOWN)):
            del self._states[batch_id]
