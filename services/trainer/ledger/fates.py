"""Keeps the book of what becomes of batches, and tells whoever waits for them."""

import asyncio
import logging
from collections.abc import Iterable, Sequence

from services.trainer.ledger.pending_batches import Ack, BatchBook, Pending
from services.trainer.ledger.progress import Progress
from services.trainer.ledger.rejections import Rejections
from services.trainer.nodes.decisions import Applied, Closed, Skipped
from services.trainer.outbox import Outbox
from shared.bus.base import Bus
from shared.errors import BusError
from shared.messages.inference import TaskEnded
from shared.messages.training import BatchApplied, RejectedBatch
from shared.subjects import ENDED

MAX_FAILURES = 2
"""A batch whose computation fails so often is rejected: once may be the node's fault."""

log = logging.getLogger(__name__)


class BatchFates:
    """Changes the book at once; what takes time runs in `tasks`."""

    def __init__(
        self, bus: Bus, *, book: BatchBook, outbox: Outbox, progress: Progress, tasks: asyncio.TaskGroup
    ) -> None:
        self.changed = asyncio.Event()
        """Set when whoever waits for room, nodes or batches should look again."""
        self.progress = progress
        self.rejections = Rejections(
            bus, book=book, progress=progress, acknowledge=self.acknowledge, tasks=tasks
        )
        self._book = book
        self._outbox = outbox
        self._tasks = tasks

    def acknowledge(self, acks: Iterable[Ack]) -> None:
        """Acknowledge the finished messages to the stream, and wake whoever waits for room."""
        self.changed.set()
        self._tasks.create_task(_acknowledge(list(acks)))

    def end(self, pending: Iterable[Pending]) -> None:
        """Tell the scheduler that these batches no longer occupy a node."""
        for each in pending:
            ended = TaskEnded(task_ids=(each.batch.batch_id,))
            self._outbox.post(ENDED.at(), ended, traceparent=each.traceparent)

    def applied(self, node: int, applied: Applied) -> None:
        """Note that the node's weights contain a batch."""
        pending = self._book.apply(node, applied.batch_id)
        self.end([pending])
        pending.applied = BatchApplied(
            batch_id=applied.batch_id,
            node=node,
            version=applied.version,
            loss=applied.loss,
            num_tokens=pending.batch.num_tokens,
            held_out=pending.batch.held_out,
        )
        self.progress.publish(pending.applied, traceparent=pending.traceparent)
        pending.span.set_attributes(
            {"lemix.node": node, "lemix.weights_version": applied.version, "lemix.loss": applied.loss}
        )
        pending.span.end()
        log.info(
            "batch %s: node %d, version %d, loss %.4f", applied.batch_id, node, applied.version, applied.loss
        )

    def skipped(self, skipped: Skipped) -> None:
        """Put the skipped batch aside: applied, it would have ruined the weights."""
        self.end([self._book.pending[skipped.batch_id]])
        self._drop(skipped.batch_id, f"its gradients are not finite (loss {skipped.loss:g})")

    def closed(self, node: int, closed: Closed) -> None:
        """Have everything that is not durable on the node run again, but for a batch that fails too often."""
        lost = self._book.return_to_durable(node)
        given_back = lost + closed.unfinished
        log.warning("node %d: %s; %d batches will run again", node, closed.reason, len(given_back))
        self.end(self._book.pending[batch_id] for batch_id in closed.unfinished)
        failed = self._at_fault(closed)
        hopeless = failed if failed in given_back and self._is_hopeless(failed) else None
        self._book.wait(batch_id for batch_id in given_back if batch_id != hopeless)
        if hopeless is not None:
            self._drop(hopeless, closed.reason)

    def give_back(self, unfinished: Sequence[str]) -> None:
        """Have these batches wait for a node again."""
        self.end(self._book.pending[batch_id] for batch_id in unfinished)
        self._book.wait(unfinished)

    def _at_fault(self, closed: Closed) -> str | None:
        """The batch to blame, or None: one that finds no memory may yet be offloaded."""
        pending = self._book.pending.get(closed.unfit) if closed.unfit else None
        if pending is None or pending.offload:
            return closed.failed or closed.unfit
        pending.num_unfit += 1
        return closed.failed

    def _is_hopeless(self, batch_id: str) -> bool:
        """Count one more failure of the batch; with the first one the node has a new fence."""
        pending = self._book.pending[batch_id]
        pending.num_failures += 1
        return pending.num_failures >= MAX_FAILURES

    def _drop(self, batch_id: str, reason: str) -> None:
        pending = self._book.drop(batch_id)
        pending.span.end()
        batch = pending.batch
        rejected = RejectedBatch.of(batch.body, batch_id=batch_id, sequence=batch.sequence, reason=reason)
        self.rejections.add(rejected, pending.acks)


async def _acknowledge(acks: list[Ack]) -> None:
    for ack in acks:
        try:
            await ack()
        except BusError as error:
            # The durable checkpoints say what is done; the stream's own account is for people.
            log.warning("a training message is not acknowledged: %s", error)
