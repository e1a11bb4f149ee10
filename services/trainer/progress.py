"""Tells publishers what becomes of their batches, and answers those who have missed it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from services.trainer.batches import BatchBook
from services.trainer.outbox import Outbox
from shared.bus.base import Incoming
from shared.messages.training import (
    MAX_BATCHES_OF_MESSAGE,
    BatchDurable,
    BatchesAsked,
    BatchesNow,
    BatchEvent,
    BatchProgress,
    BatchRejected,
)
from shared.subjects import TRAIN_PROGRESS

MAX_REJECTIONS = 1024
"""Newest ones that are remembered for those who ask."""


class Progress:
    """What is told can be lost; what is answered is what the ledger says."""

    def __init__(self, outbox: Outbox, book: BatchBook, folders: Mapping[int, Path]) -> None:
        """`folders`: the newest durable checkpoint of each node that has one."""
        self._outbox = outbox
        self._book = book
        self._folders = folders
        self._rejections: dict[str, BatchRejected] = {}

    def tell(self, event: BatchEvent, *, traceparent: str = "") -> None:
        """Something has become of a batch."""
        if isinstance(event, BatchRejected):
            self._remember(event)
        self._outbox.post(TRAIN_PROGRESS.at(), BatchProgress(event=event), traceparent)

    def tell_durable(self, batch_ids: Sequence[str], node: int, version: int) -> None:
        """The node's newest checkpoint contains these batches."""
        for start in range(0, len(batch_ids), MAX_BATCHES_OF_MESSAGE):
            some = tuple(batch_ids[start : start + MAX_BATCHES_OF_MESSAGE])
            self.tell(self._durable(some, node, version))

    async def answer(self, incoming: Incoming[BatchesAsked]) -> BatchesNow:
        """How these batches stand."""
        batch_ids, ledger = incoming.message.batch_ids, self._book.ledger
        events = [event for batch_id in batch_ids if (event := self._newest(batch_id)) is not None]
        unknown = (
            batch_id
            for batch_id in batch_ids
            if not ledger.knows(batch_id) and batch_id not in self._rejections
        )
        return BatchesNow(events=tuple(events), unknown=tuple(unknown), read_up_to=ledger.read_up_to)

    def _newest(self, batch_id: str) -> BatchEvent | None:
        if batch_id in self._book.pending:
            return self._book.pending[batch_id].applied
        node = self._book.ledger.node_of_durable(batch_id)
        if node is not None:
            return self._durable((batch_id,), node, self._book.ledger.lineage(node).durable_version)
        return self._rejections.get(batch_id)

    def _durable(self, batch_ids: tuple[str, ...], node: int, version: int) -> BatchDurable:
        folder = str(self._folders[node])
        return BatchDurable(batch_ids=batch_ids, node=node, version=version, checkpoint=folder)

    def _remember(self, rejected: BatchRejected) -> None:
        self._rejections[rejected.batch_id] = rejected
        if len(self._rejections) > MAX_REJECTIONS:
            del self._rejections[next(iter(self._rejections))]
