"""What becomes of a batch for which a node's memory gave out."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from services.trainer.intake.microbatches import Rows, TrainingBatch
from services.trainer.ledger.fates import BatchFates
from services.trainer.ledger.ledger import Ledger
from services.trainer.ledger.pending_batches import MAX_UNFIT, BatchBook, Pending
from services.trainer.ledger.progress import Progress
from services.trainer.nodes.decisions import Closed
from services.trainer.outbox import Outbox
from shared.messages.training import RejectedBatch
from shared.telemetry import NoTelemetry


@dataclass
class FakeBus:
    """Keeps the rejections."""

    rejected: list[RejectedBatch] = field(default_factory=list)

    async def publish(self, subject: Any, message: Any, *, traceparent: str) -> None:
        pass

    async def publish_durable(self, subject: Any, body: bytes, *, message_id: str) -> None:
        self.rejected.append(RejectedBatch.model_validate_json(body))


async def no_ack() -> None:
    pass


Event = Callable[[BatchFates], None]


def after_failures(num_failures: int) -> tuple[Pending, BatchBook, list[RejectedBatch]]:
    """No memory for the only batch, each time."""
    return after(lambda fates: fates.closed(0, Closed("no memory", ("b",), unfit="b")), num_failures)


def after(event: Event, times: int) -> tuple[Pending, BatchBook, list[RejectedBatch]]:
    """Place the only batch so often, offloaded when it has to be, and have that happen to it each time."""
    rows = (Rows(lengths=(2,), tokens=(1, 2), label_rows=(0,), labels=(2,)),)
    pending = Pending(TrainingBatch("b", 1, rows, b"{}", ""), NoTelemetry(), parent="", ack=no_ack)
    book, bus = BatchBook(Ledger.restore({}, (), 0)), FakeBus()
    outbox = Outbox(bus)

    async def case() -> None:
        async with asyncio.TaskGroup() as tasks:
            progress = Progress(outbox, book, lambda node: None)
            fates = BatchFates(bus, book=book, outbox=outbox, progress=progress, tasks=tasks)
            book.admit(pending)
            for _ in range(times):
                book.pop_waiting().offload = pending.must_offload
                event(fates)

    asyncio.run(case())
    return pending, book, bus.rejected


def test_a_batch_that_finds_no_memory_runs_again_as_it_was() -> None:
    pending, book, _ = after_failures(MAX_UNFIT - 1)
    assert book.num_waiting == 1
    assert not pending.must_offload


def test_what_a_node_that_halts_has_not_begun_waits_for_another() -> None:
    _, book, rejected = after(lambda fates: fates.give_back(["b"]), 1)
    assert book.num_waiting == 1
    assert rejected == []


def test_after_some_times_it_is_offloaded() -> None:
    pending, book, rejected = after_failures(MAX_UNFIT)
    assert book.num_waiting == 1
    assert pending.must_offload
    assert rejected == []


def test_one_that_finds_none_although_it_is_offloaded_is_rejected() -> None:
    _, book, rejected = after_failures(MAX_UNFIT + 2)
    assert book.num_waiting == 0
    assert [(each.batch_id, each.reason, each.published) for each in rejected] == [("b", "no memory", b"{}")]
