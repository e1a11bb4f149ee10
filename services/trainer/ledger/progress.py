"""Publishes what becomes of batches, and answers those who have missed it."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from services.trainer.ledger.pending_batches import BatchBook
from services.trainer.outbox import Outbox
from shared.bus.base import Incoming
from shared.messages.training import (
    MAX_BATCHES_OF_MESSAGE,
    BatchApplied,
    BatchDurable,
    BatchesAsked,
    BatchesNow,
    BatchEvent,
    BatchHeldOut,
    BatchProgress,
    BatchRejected,
)
from shared.subjects import TRAIN_PROGRESS

DISCARDED = (
    "a rollback to an older version took it out of the weights (lemix train publish --again trains it anew)"
)
MAX_REMEMBERED = 1024
"""Newest batches that no weights contain whose end is remembered for those who ask."""


class Progress:
    """News of batches: events can be lost, answers come from the ledger."""

    def __init__(self, outbox: Outbox, book: BatchBook, folder_of: Callable[[int], Path | None]) -> None:
        """`folder_of`: the newest durable checkpoint of a node."""
        self._outbox = outbox
        self._book = book
        self._folder_of = folder_of
        self.training_losses: dict[int, float] = {}
        """The loss of the newest batch of each node, since it was restored."""
        self._without_weights: dict[str, BatchRejected | BatchHeldOut] = {}
        """By batch: how it ended, where no weights will contain it."""

    def publish(self, event: BatchEvent, *, traceparent: str = "") -> None:
        """Publish an event of a batch."""
        if isinstance(event, BatchRejected | BatchHeldOut):
            self._remember(event)
        elif isinstance(event, BatchApplied):
            self.training_losses[event.node] = event.loss
        self._outbox.post(TRAIN_PROGRESS.at(), BatchProgress(event=event), traceparent)

    def publish_durable(self, batch_ids: Sequence[str], node: int, version: int) -> None:
        """Report that the node's newest checkpoint contains these batches."""
        for start in range(0, len(batch_ids), MAX_BATCHES_OF_MESSAGE):
            some = tuple(batch_ids[start : start + MAX_BATCHES_OF_MESSAGE])
            self.publish(self._durable(some, node, version))

    def publish_discarded(self, batch_ids: Iterable[str]) -> None:
        """Report that a rollback has taken these batches out of the weights."""
        for batch_id in batch_ids:
            self.publish(BatchRejected(batch_id=batch_id, reason=DISCARDED))

    async def answer(self, incoming: Incoming[BatchesAsked]) -> BatchesNow:
        """Answer how these batches stand."""
        ledger, pending = self._book.ledger, self._book.pending
        durable: defaultdict[int, list[str]] = defaultdict(list)
        events: list[BatchEvent] = []
        unknown = []
        for batch_id in incoming.message.batch_ids:
            node = ledger.node_of_durable(batch_id)
            newest = pending[batch_id].applied if batch_id in pending else self._without_weights.get(batch_id)
            if node is not None:
                durable[node].append(batch_id)
            elif newest is not None:
                events.append(newest)
            elif batch_id in ledger.discarded_ids:
                events.append(BatchRejected(batch_id=batch_id, reason=DISCARDED))
            elif not ledger.knows(batch_id):
                unknown.append(batch_id)
        for node, batch_ids in durable.items():
            version = ledger.lineage(node).durable_version
            events.append(self._durable(tuple(batch_ids), node, version))
        return BatchesNow(events=tuple(events), unknown=tuple(unknown), read_up_to=ledger.read_up_to)

    def _durable(self, batch_ids: tuple[str, ...], node: int, version: int) -> BatchDurable:
        held_out = self._book.ledger.held_out
        return BatchDurable(
            batch_ids=batch_ids,
            node=node,
            version=version,
            checkpoint=str(self._folder_of(node)),
            held_out={batch_id: held_out[batch_id] for batch_id in batch_ids if batch_id in held_out},
        )

    def _remember(self, ended: BatchRejected | BatchHeldOut) -> None:
        self._without_weights[ended.batch_id] = ended
        if len(self._without_weights) > MAX_REMEMBERED:
            del self._without_weights[next(iter(self._without_weights))]
