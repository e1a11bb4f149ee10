"""Batches on their way in: read from the stream, refused or accepted, and placed on a node."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from services.trainer.intake.microbatches import HeldOutBatch, TrainingBatch
from services.trainer.intake.reading import Intake
from services.trainer.ledger.fates import BatchFates
from services.trainer.ledger.pending_batches import BatchBook, Pending
from services.trainer.nodes.stage_listener import Nodes
from shared.bus.base import TRACE_HEADER, Bus, StreamMessage, StreamReader
from shared.errors import BusError, RefusedError
from shared.messages.inference import DEFERRED
from shared.messages.training import BatchDeferred, BatchHeldOut, BatchPlaced, RejectedBatch, TrainingTask
from shared.subjects import PLACE
from shared.telemetry import Telemetry

MIN_AHEAD = 8
"""Batches that are taken in before a node has room for them, at least."""
READ_TIMEOUT_S = 5.0
PLACE_TIMEOUT_S = 5.0
"""Longer than the scheduler holds a batch that must wait."""
PLACE_RETRY_S = 0.2

log = logging.getLogger(__name__)


class BatchFlow:
    """Two loops, which wait for each other only through the book of batches."""

    def __init__(
        self,
        intake: Intake,
        *,
        bus: Bus,
        telemetry: Telemetry,
        book: BatchBook,
        fates: BatchFates,
        nodes: Nodes,
        max_pending: int,
    ) -> None:
        self._intake = intake
        self._bus = bus
        self._telemetry = telemetry
        self._book = book
        self._fates = fates
        self._nodes = nodes
        self._max_pending = max_pending

    async def read(self, reader: StreamReader) -> None:
        """Take in the stream for ever, no faster than nodes take batches."""
        while True:
            await self._until(self._has_room)
            if (message := await reader.next(timeout_s=READ_TIMEOUT_S)) is not None:
                await self._receive(message)
                self._fates.changed.set()

    async def place(self) -> None:
        """Give waiting batches to nodes, for ever."""
        while True:
            await self._until(lambda: self._book.num_waiting > 0 and self._nodes.have_room)
            pending = self._book.pop_waiting()
            if not await self._place(pending):
                self._book.wait([pending.batch.batch_id])

    def _has_room(self) -> bool:
        enough = max(MIN_AHEAD, self._nodes.num_wanted)
        return self._book.num_waiting < enough and len(self._book.ledger.pending) < self._max_pending

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._fates.changed.clear()
            await self._fates.changed.wait()

    async def _receive(self, message: StreamMessage) -> None:
        ledger = self._book.ledger
        if ledger.is_done(message.sequence):
            self._book.pass_over(message.sequence)
            self._fates.acknowledge([message.ack])
        elif message.sequence not in ledger.pending.values():  # else the stream gives it a second time
            prepared = await asyncio.to_thread(partial(self._intake.prepare, message))
            self._decide(message, prepared)

    def _decide(self, message: StreamMessage, prepared: TrainingBatch | HeldOutBatch | RejectedBatch) -> None:
        if isinstance(prepared, RejectedBatch):
            self._book.begin_rejection(message.sequence)
            self._fates.rejections.add(prepared, [message.ack])
        elif self._book.ledger.knows(prepared.batch_id):
            log.warning(
                "batch %s (%d) was published before: not applied again", prepared.batch_id, message.sequence
            )
            self._fates.acknowledge(self._book.repeat(message.sequence, prepared.batch_id, message.ack))
        elif isinstance(prepared, HeldOutBatch):
            log.info("batch %s (%d) trains nothing: it is held out", prepared.batch_id, message.sequence)
            self._book.skip(message.sequence)
            self._fates.progress.publish(BatchHeldOut(batch_id=prepared.batch_id))
            self._fates.acknowledge([message.ack])
        else:
            parent = message.headers.get(TRACE_HEADER, "")
            self._book.admit(Pending(prepared, self._telemetry, parent=parent, ack=message.ack))

    async def _place(self, pending: Pending) -> bool:
        """Ask the scheduler for a node. False when there is none now: after a pause, or its own wait."""
        batch = pending.batch
        try:
            placed = await self._bus.request(
                PLACE.at(), _task_of(batch), timeout_s=PLACE_TIMEOUT_S, traceparent=pending.traceparent
            )
        except BusError as error:
            await self._pause_after(batch.batch_id, error)
            return False
        pending.offload = placed.offload or pending.must_offload
        if self._book.has_waiting_before(batch.sequence):
            # A node has failed meanwhile, and its batches go first: else the weights would depend on that.
            self._fates.end([pending])
            return False
        if self._nodes.place(placed.node, batch.batch_id):
            self._fates.progress.publish(
                BatchPlaced(batch_id=batch.batch_id, node=placed.node), traceparent=pending.traceparent
            )
            return True
        self._fates.end([pending])
        await asyncio.sleep(PLACE_RETRY_S)
        return False

    async def _pause_after(self, batch_id: str, error: BusError) -> None:
        """The scheduler holds a batch that it defers: that was the pause."""
        if isinstance(error, RefusedError) and error.reason.startswith(DEFERRED):
            log.debug("batch %s: %s", batch_id, error)
            self._fates.progress.publish(BatchDeferred(batch_id=batch_id))
            return
        log.info("batch %s finds no node: %s", batch_id, error)
        await asyncio.sleep(PLACE_RETRY_S)


def _task_of(batch: TrainingBatch) -> TrainingTask:
    return TrainingTask(
        task_id=batch.batch_id,
        microbatch_tokens=tuple(len(rows.tokens) for rows in batch.microbatches),
        microbatch_lengths=tuple(rows.lengths for rows in batch.microbatches),
    )
