"""The trainer's batches: accepted from the stream, and in no durable checkpoint yet."""

import bisect
from collections.abc import Awaitable, Callable, Collection, Iterable
from operator import attrgetter

from opentelemetry.trace import Span

from services.trainer.intake.microbatches import TrainingBatch
from services.trainer.intake.reading import id_of
from services.trainer.ledger.ledger import Ledger, Lineage
from shared.messages.lineage import LearntBatch
from shared.messages.training import BatchApplied
from shared.telemetry import Attributes, Telemetry, traceparent_of

MAX_UNFIT = 3
"""A batch that found no memory so often is offloaded: the first times others may have had it."""

Ack = Callable[[], Awaitable[None]]


class Pending:
    """A batch until it is durable, with its trace: one span from its acceptance until it is applied."""

    def __init__(self, batch: TrainingBatch, telemetry: Telemetry, *, parent: str, ack: Ack) -> None:
        self.batch = batch
        self.acks = [ack]
        """Acknowledgements to call when the batch is finished: its own, and those of repeated messages."""
        self.offload = False
        """Where it is placed now, for want of memory: stages keep what they save of it on the host."""
        self.num_failures = 0
        """Lives of nodes that its computation has ended."""
        self.num_unfit = 0
        """Lives of nodes that ended because it found no memory."""
        self.applied: BatchApplied | None = None
        """The event of its step, while a node's weights contain it."""
        self._telemetry = telemetry
        self._parent = parent
        self.span = self._new_span()

    @property
    def traceparent(self) -> str:
        return traceparent_of(self.span)

    @property
    def must_offload(self) -> bool:
        """Whether it has failed without offloading often enough, whatever the scheduler says."""
        return self.num_unfit >= MAX_UNFIT

    def begin_again(self) -> None:
        """Note that an applied batch must be applied again; that is another span of its trace."""
        self.applied = None
        if not self.span.is_recording():
            self.span = self._new_span()

    def _new_span(self) -> Span:
        attributes: Attributes = {
            "lemix.batch_id": self.batch.batch_id,
            "lemix.sequence": self.batch.sequence,
            "lemix.num_tokens": self.batch.num_tokens,
            "lemix.num_microbatches": len(self.batch.microbatches),
        }
        return self._telemetry.span("trainer.batch", traceparent=self._parent, attributes=attributes)


class BatchBook:
    """Pending batches, the order in which they wait for a node, and the ledger of all."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.pending: dict[str, Pending] = {}
        self._waiting: list[TrainingBatch] = []
        """Not placed on any node; in stream order, so that what is given back goes first."""

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def admit(self, pending: Pending) -> None:
        """Take in a new batch, which then waits."""
        batch = pending.batch
        self.ledger = self.ledger.accept(batch.sequence, batch.batch_id, batch.held_out)
        self.pending[batch.batch_id] = pending
        self.wait([batch.batch_id])

    def wait(self, batch_ids: Iterable[str]) -> None:
        """Queue these pending batches again; no node holds them."""
        for batch_id in batch_ids:
            self.pending[batch_id].begin_again()
            bisect.insort(self._waiting, self.pending[batch_id].batch, key=attrgetter("sequence"))

    def pop_waiting(self) -> Pending:
        """Take the first waiting batch out of the queue."""
        return self.pending[self._waiting.pop(0).batch_id]

    def has_waiting_before(self, sequence: int) -> bool:
        """Whether a batch of an earlier place in the stream waits."""
        return bool(self._waiting) and self._waiting[0].sequence < sequence

    def repeat(self, sequence: int, batch_id: str, ack: Ack) -> list[Ack]:
        """Note a message that repeats a known batch; returns the messages to acknowledge now."""
        self.ledger = self.ledger.skip(sequence)
        if batch_id not in self.pending:
            return [ack]
        self.pending[batch_id].acks.append(ack)
        return []

    def apply(self, node: int, batch_id: str) -> Pending:
        """Note that the node's weights contain the batch."""
        self.ledger = self.ledger.apply(node, batch_id)
        return self.pending[batch_id]

    def return_to_durable(self, node: int) -> tuple[str, ...]:
        """Note that the node is back at its durable checkpoint; returns the batches that it lost."""
        lost = self.ledger.only_applied_by(node)
        self.ledger = self.ledger.return_to_durable(node)
        return lost

    def share(self, nodes: Iterable[int]) -> None:
        """Note that these nodes' weights are merged."""
        self.ledger = self.ledger.share(nodes)

    def join(self, node: int) -> None:
        """Note that the node holds the newest durable weights of any node."""
        self.ledger = self.ledger.join(node)

    def roll_back(self, nodes: Collection[int], target: Lineage) -> list[Ack]:
        """Note that these nodes are rolled back for good; returns the messages to acknowledge."""
        discarded = self.ledger.applied_by(nodes)
        self.ledger = self.ledger.roll_back(nodes, target)
        return [ack for batch_id in discarded for ack in self.pending.pop(batch_id).acks]

    def saved_by(self, node: int, version: int) -> tuple[str, ...]:
        """The batches that are durable once a checkpoint of the node at `version` is."""
        lineage = self.ledger.lineage(node)
        return lineage.applied[: version - lineage.durable_version]

    def learnt_by(self, node: int, version: int) -> list[LearntBatch]:
        """The same batches, as the lineage file tells of them."""
        return [self.pending[batch_id].batch.as_learnt() for batch_id in self.saved_by(node, version)]

    def make_durable(self, node: int, version: int, *, entry: int | None) -> list[Ack]:
        """Note a durable checkpoint of the node with `version` steps; returns the messages to acknowledge.

        `entry`: its newest one in the lineage file.
        """
        before = self.ledger.pending
        self.ledger = self.ledger.make_durable(node, version, entry=entry)
        saved = [batch_id for batch_id in before if batch_id not in self.ledger.pending]
        return [ack for batch_id in saved for ack in self.pending.pop(batch_id).acks]

    def pass_over(self, sequence: int) -> None:
        """Pass over a message that was finished before."""
        self.ledger = self.ledger.pass_over(sequence)

    def begin_rejection(self, sequence: int) -> None:
        """Note a message that is refused; it is finished when its rejection is stored (`skip`)."""
        self.ledger = self.ledger.accept(sequence, id_of(sequence))

    def drop(self, batch_id: str) -> Pending:
        """Drop a pending batch that neither waits nor is on a node; it never runs again. `skip` follows."""
        return self.pending.pop(batch_id)

    def skip(self, sequence: int) -> None:
        """Finish a message that was refused, or a batch that was dropped."""
        self.ledger = self.ledger.skip(sequence)
