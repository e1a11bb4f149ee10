"""How the trainer asks for nodes: at once again when it was deferred, after a pause when it was refused."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from lemix.simulation.loop import run_virtual
from services.trainer.intake.batch_flow import PLACE_RETRY_S, BatchFlow
from services.trainer.intake.microbatches import Rows, TrainingBatch
from services.trainer.ledger.ledger import Ledger
from services.trainer.ledger.pending_batches import MAX_UNFIT, BatchBook, Pending
from shared.errors import RefusedError
from shared.messages.inference import DEFERRED, Placed
from shared.messages.training import BatchDeferred, BatchEvent, BatchPlaced, TrainingTask
from shared.telemetry import NoTelemetry

HELD_S = 3.0


@dataclass
class FakeScheduler:
    """Stands for the bus: answers what it is given, in turn, each after HELD_S."""

    answers: list[Placed | RefusedError]
    asked: list[tuple[float, TrainingTask]] = field(default_factory=list)

    async def request(
        self, subject: Any, task: TrainingTask, *, timeout_s: float, traceparent: str
    ) -> Placed:
        self.asked.append((asyncio.get_running_loop().time(), task))
        await asyncio.sleep(HELD_S)
        answer = self.answers.pop(0)
        if isinstance(answer, RefusedError):
            raise answer
        return answer


@dataclass
class FakeNodes:
    """Takes what is placed."""

    placed: list[tuple[int, str]] = field(default_factory=list)
    have_room: bool = True

    def place(self, node: int, batch_id: str) -> bool:
        self.placed.append((node, batch_id))
        self.have_room = False
        return True


@dataclass
class FakeProgress:
    told: list[BatchEvent] = field(default_factory=list)

    def publish(self, event: BatchEvent, *, traceparent: str = "") -> None:
        self.told.append(event)


@dataclass
class FakeFates:
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    progress: FakeProgress = field(default_factory=FakeProgress)
    ended: list[str] = field(default_factory=list)

    def end(self, pending: list[Pending]) -> None:
        self.ended += [each.batch.batch_id for each in pending]


async def no_ack() -> None:
    pass


def pending(batch_id: str = "b", sequence: int = 1) -> Pending:
    rows = (
        Rows(lengths=(2, 3), tokens=(1, 2, 3, 4, 5), label_rows=(0,), labels=(2,)),
        Rows(lengths=(1,), tokens=(6,), label_rows=(0,), labels=(7,)),
    )
    return Pending(TrainingBatch(batch_id, sequence, rows, b"{}", ""), NoTelemetry(), parent="", ack=no_ack)


def flow_of(book: BatchBook, scheduler: Any, fates: Any, nodes: Any) -> BatchFlow:
    return BatchFlow(
        None,
        bus=scheduler,
        telemetry=NoTelemetry(),
        book=book,
        fates=fates,
        nodes=nodes,
        max_pending=8,
    )


def placed_after(
    answers: list[Placed | RefusedError],
    batch: Pending | None = None,
    fates: FakeFates | None = None,
) -> tuple[FakeScheduler, FakeNodes, Pending]:
    """Place one batch with a scheduler that answers so."""
    scheduler, nodes, batch = FakeScheduler(answers), FakeNodes(), batch or pending()
    fates = fates or FakeFates()

    async def case() -> None:
        book = BatchBook(Ledger.restore({}, (), 0))
        book.admit(batch)
        placing = asyncio.create_task(flow_of(book, scheduler, fates, nodes).place())
        await asyncio.sleep(60)
        placing.cancel()

    run_virtual(case())
    return scheduler, nodes, batch


def test_the_scheduler_is_told_the_size_of_every_example() -> None:
    scheduler, nodes, batch = placed_after([Placed(node=3)])
    ((_, task),) = scheduler.asked
    assert (task.microbatch_tokens, task.microbatch_lengths) == ((5, 1), ((2, 3), (1,)))
    assert (nodes.placed, batch.offload) == ([(3, "b")], False)


def test_a_batch_that_does_not_fit_is_offloaded() -> None:
    _, _, batch = placed_after([Placed(node=0, offload=True)])
    assert batch.offload


def test_a_batch_that_never_fitted_is_offloaded_whatever_the_scheduler_says() -> None:
    batch = pending()
    batch.num_unfit = MAX_UNFIT
    placed_after([Placed(node=0)], batch)
    assert batch.offload


@pytest.mark.parametrize(
    ("reason", "pause_s"), [(f"{DEFERRED}: x", 0.0), ("no node is ready", PLACE_RETRY_S)]
)
def test_a_pause_follows_a_refusal_but_not_a_deferral(reason: str, pause_s: float) -> None:
    scheduler, nodes, _ = placed_after([RefusedError(reason), RefusedError(reason), Placed(node=0)])
    times_s = [at_s for at_s, _ in scheduler.asked]
    assert times_s == pytest.approx([0.0, HELD_S + pause_s, 2 * (HELD_S + pause_s)])
    assert len(nodes.placed) == 1


def test_publishers_are_told_of_deferrals_and_of_the_node_but_not_of_other_refusals() -> None:
    fates = FakeFates()
    answers = [RefusedError(f"{DEFERRED}: x"), RefusedError("no node is ready"), Placed(node=3)]
    placed_after(answers, fates=fates)
    assert fates.progress.told == [BatchDeferred(batch_id="b"), BatchPlaced(batch_id="b", node=3)]


def test_a_batch_that_was_given_back_meanwhile_goes_before_a_later_one() -> None:
    scheduler, nodes, fates = FakeScheduler([Placed(node=0)] * 2), FakeNodes(), FakeFates()

    async def case() -> None:
        book = BatchBook(Ledger.restore({}, (), 0))
        for each in (pending("first", 1), pending("second", 2)):
            book.admit(each)
        assert book.pop_waiting().batch.batch_id == "first"
        placing = asyncio.create_task(flow_of(book, scheduler, fates, nodes).place())
        await asyncio.sleep(HELD_S / 2)
        book.wait(["first"])
        await asyncio.sleep(60)
        placing.cancel()

    run_virtual(case())
    assert [task.task_id for _, task in scheduler.asked] == ["second", "first"]
    assert [batch_id for _, batch_id in nodes.placed] == ["first"]
    assert fates.ended == ["second"]
