"""Rejected batches: their publishers hear the reason, and the batches are kept as published."""

import asyncio
import logging
from collections.abc import Callable, Iterable

from services.trainer.ledger.pending_batches import Ack, BatchBook
from services.trainer.ledger.progress import Progress
from shared.bus.base import Bus
from shared.errors import BusError, MessageTooLargeError
from shared.messages.training import BatchRejected, RejectedBatch
from shared.subjects import REJECTED

MAX_REASON_CHARACTERS = 2000
RETRY_S = 1.0

log = logging.getLogger(__name__)


class Rejections:
    """Stores rejections in `tasks`. Only when the bus has stored one is the message of its batch finished."""

    def __init__(
        self,
        bus: Bus,
        *,
        book: BatchBook,
        progress: Progress,
        acknowledge: Callable[[Iterable[Ack]], None],
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._bus = bus
        self._book = book
        self._progress = progress
        self._acknowledge = acknowledge
        self._tasks = tasks

    def add(self, rejected: RejectedBatch, acks: Iterable[Ack]) -> None:
        """Store the rejection, report it, and acknowledge the batch; the book holds it until then."""
        rejected = rejected.model_copy(update={"reason": rejected.reason[:MAX_REASON_CHARACTERS]})
        log.warning("batch %s (%d) is rejected: %s", rejected.batch_id, rejected.sequence, rejected.reason)
        self._tasks.create_task(self._publish(rejected, list(acks)))

    async def _publish(self, rejected: RejectedBatch, acks: list[Ack]) -> None:
        while not await self._is_stored(rejected):  # noqa: ASYNC110  # each time it is tried again
            await asyncio.sleep(RETRY_S)
        self._book.skip(rejected.sequence)
        self._progress.publish(BatchRejected(batch_id=rejected.batch_id, reason=rejected.reason))
        self._acknowledge(acks)

    async def _is_stored(self, rejected: RejectedBatch) -> bool:
        try:
            await self._store(rejected)
        except BusError as error:
            log.error("the rejection of batch %s is not stored yet: %s", rejected.batch_id, error)
            return False
        return True

    async def _store(self, rejected: RejectedBatch) -> None:
        """Store the rejection with the batch as published, if that fits beside the reason."""
        body = rejected.model_dump_json().encode()
        try:
            await self._bus.publish_durable(REJECTED, body, message_id=f"rejected-{rejected.sequence}")
        except MessageTooLargeError as error:
            if not rejected.body:
                raise
            log.warning(
                "the rejection of batch %s is stored without its content: %s", rejected.batch_id, error
            )
            await self._store(rejected.without_body())
