"""Waiting for nodes, and for batches: told by the trainer, asked for after a silence, or never there."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from msgspec import structs

from lemix.simulation.loop import run_virtual
from lemix.waiting import AppliedBatches, ProgressError, judged_weights, wait_nodes_ready
from shared.bus.base import Incoming
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.errors import RefusedError
from shared.messages.cluster import ClusterStatus, NodeStatus, StatusRequest
from shared.messages.training import (
    BatchApplied,
    BatchDeferred,
    BatchDurable,
    BatchesAsked,
    BatchesNow,
    BatchEvent,
    BatchHeldOut,
    BatchProgress,
    BatchRejected,
)
from shared.messages.weights import NodeWeights, WeightsRequest, WeightsStatus
from shared.subjects import NODE_WEIGHTS, STATUS, TRAIN_PROGRESS, TRAIN_STATUS
from tests.support.cluster import heartbeat


def test_nodes_are_waited_for_until_the_trainer_has_restored_them() -> None:
    fences = iter([0, 0, 7])

    async def status(incoming: Incoming[StatusRequest]) -> ClusterStatus:
        stage = structs.replace(heartbeat(0), fence=next(fences))
        node = NodeStatus(node=0, ready=True, inference_tasks=0, training_tasks=0, stages=(stage,))
        return ClusterStatus(policy="p", nodes=(node,))

    async def case() -> None:
        bus = MemoryBroker().connect()
        await bus.respond(STATUS.at(), status)
        await wait_nodes_ready(bus, 1)
        await bus.close()

    run_virtual(case())
    assert list(fences) == []


def weights(
    node: int, version: int, *, published: int | None, withheld: int | None = None, is_guarded: bool = True
) -> NodeWeights:
    return NodeWeights(
        node=node,
        version=version,
        durable_version=version,
        published=published,
        is_guarded=is_guarded,
        held_out_loss=None,
        samples_loss=None,
        num_withheld=0 if withheld is None else 1,
        last_withheld=withheld,
        newest_judged=max(published or 0, withheld or 0),
    )


def judged_of(*answers: tuple[NodeWeights, ...]) -> list[tuple[NodeWeights, int]]:
    """The nodes, as the trainer tells of them from one time to the next; the last answer comes again.

    At first it cannot answer.
    """
    now, faults = iter(answers), iter([True])

    async def case() -> list[tuple[NodeWeights, int]]:
        bus, last = MemoryBroker().connect(), answers[-1]

        async def answer(incoming: Incoming[WeightsRequest]) -> WeightsStatus:
            if next(faults, False):
                raise RefusedError("not now", code=503)
            return WeightsStatus(nodes=next(now, last))

        await bus.respond(NODE_WEIGHTS.at(), answer)
        found = await judged_weights(bus, 60.0)
        await bus.close()
        return found

    return run_virtual(case())


def test_a_verdict_is_waited_for_on_every_guarded_node() -> None:
    both_judged = (weights(0, 4, published=4), weights(1, 6, published=0, withheld=5))
    waiting = (weights(0, 4, published=0), weights(1, 5, published=0))
    expected = [(both_judged[0], 4), (both_judged[1], 5)]
    assert judged_of((), waiting, (both_judged[0], waiting[1]), both_judged) == expected


def test_a_verdict_that_does_not_come_is_not_waited_for_for_ever() -> None:
    ((found, version),) = judged_of((weights(0, 4, published=0),))
    assert found.awaits_verdict(version)


def test_nodes_that_are_all_being_restored_are_waited_for_and_told_of() -> None:
    restoring, judged = weights(0, 2, published=None), weights(0, 4, published=4)
    assert judged_of((restoring,)) == [(restoring, 2)]
    assert judged_of((restoring,), (judged,)) == [(judged, 4)]


def test_there_is_no_verdict_without_a_guard() -> None:
    assert judged_of((weights(0, 4, published=None, is_guarded=False),)) == []


def applied(batch_id: str, *, node: int = 0, version: int = 1) -> BatchApplied:
    return BatchApplied(batch_id=batch_id, node=node, version=version, loss=1.0, num_tokens=4)


async def tell(bus: MemoryBus, *events: BatchEvent) -> None:
    for event in events:
        await bus.publish(TRAIN_PROGRESS.at(), BatchProgress(event=event))


def with_batches(case: Callable[[MemoryBus, AppliedBatches], Awaitable[None]]) -> None:
    """Run `case` with the trainer's bus, in virtual time."""

    async def run() -> None:
        broker = MemoryBroker()
        trainer, bus = broker.connect(), broker.connect()
        await case(trainer, await AppliedBatches.following(bus))
        for each in (trainer, bus):
            await each.close()

    run_virtual(run())


def test_batches_are_counted_once_and_steps_by_node_and_version() -> None:
    async def case(trainer: MemoryBus, batches: AppliedBatches) -> None:
        told: list[int] = []
        shared = applied("b", node=0, version=1), applied("c", node=1, version=1)
        await tell(trainer, applied("a"), *shared, applied("b", node=0, version=1))
        await batches.wait_for(["a", "b", "c"], on_applied=told.append)
        assert sum(told) == 3
        assert (batches.num_batches, batches.num_steps) == (3, 2)

    with_batches(case)


def test_after_a_silence_the_trainer_is_asked_for_those_that_are_missing() -> None:
    asked: list[tuple[str, ...]] = []

    async def answer(incoming: Incoming[BatchesAsked]) -> BatchesNow:
        asked.append(incoming.message.batch_ids)
        durable = BatchDurable(batch_ids=("b", "c"), node=0, version=3, checkpoint="")
        return BatchesNow(events=(durable,), unknown=(), read_up_to=3)

    async def case(trainer: MemoryBus, batches: AppliedBatches) -> None:
        await trainer.respond(TRAIN_STATUS.at(), answer)
        await tell(trainer, applied("a"))
        await batches.wait_for(["a", "b", "c"])
        assert (batches.num_batches, batches.num_steps) == (3, 3)

    with_batches(case)
    assert asked == [("b", "c")]


def test_a_batch_that_is_held_out_is_waited_for_no_longer() -> None:
    async def case(trainer: MemoryBus, batches: AppliedBatches) -> None:
        await tell(trainer, applied("a"), BatchHeldOut(batch_id="b"))
        await batches.wait_for(["a", "b"])

    with_batches(case)


def test_a_rejected_batch_ends_the_wait_at_once() -> None:
    async def case(trainer: MemoryBus, batches: AppliedBatches) -> None:
        await tell(trainer, BatchRejected(batch_id="a", reason="no examples"))
        with pytest.raises(ProgressError, match="batch a was rejected: no examples"):
            await batches.wait_for(["a", "b"])

    with_batches(case)


def test_a_wait_without_progress_says_how_far_it_came_whatever_else_is_told() -> None:
    async def others(trainer: MemoryBus) -> None:
        while True:
            await tell(trainer, BatchDeferred(batch_id="b"))
            await asyncio.sleep(1.0)  # virtual

    async def case(trainer: MemoryBus, batches: AppliedBatches) -> None:
        telling = asyncio.create_task(others(trainer))
        await tell(trainer, applied("a"))
        with pytest.raises(ProgressError, match="1 of 2 batches were applied"):
            await batches.wait_for(["a", "b"])
        telling.cancel()

    with_batches(case)
