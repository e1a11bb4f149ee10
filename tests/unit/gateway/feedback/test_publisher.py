"""Batches of feedback are published once, whatever goes wrong on the way."""

import asyncio
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from services.gateway.feedback import publisher
from services.gateway.feedback.answers import Lesson
from services.gateway.feedback.batch_store import BatchStore
from services.gateway.feedback.batches import BatchState
from services.gateway.feedback.database import Database
from services.gateway.feedback.feedback_store import FeedbackStore
from services.gateway.feedback.publisher import FeedbackPublisher
from services.gateway.settings import GatewaySettings
from shared.bus.base import Incoming, Stored
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.clock import SystemClock
from shared.errors import BusError
from shared.messages.training import (
    BatchApplied,
    BatchDurable,
    BatchesAsked,
    BatchesNow,
    BatchEvent,
    BatchProgress,
    BatchRejected,
)
from shared.subjects import TRAIN_PROGRESS, TRAIN_STATUS
from tests.support.fake_trainer import STREAM
from tests.support.waiting import until
from tests.unit.gateway.feedback.test_stores import record

DEADLINE_S = 60.0


class LosingBus(MemoryBus):
    """The answers to the first publications are lost, after the stream has stored them."""

    num_lost = 2

    async def publish_durable(
        self, subject: str, body: bytes, *, message_id: str = "", headers: dict[str, str] | None = None
    ) -> Stored:
        stored = await super().publish_durable(subject, body, message_id=message_id, headers=headers)
        if self.num_lost:
            self.num_lost -= 1
            raise BusError("the answer is lost")
        return stored


class Run:
    """A gateway's publisher over a file with three corrections."""

    def __init__(self, tmp_path: Path) -> None:
        self.broker = MemoryBroker()
        self.bus = LosingBus(self.broker, "")
        database = Database(tmp_path / "feedback.sqlite")
        self.feedback, self.store = FeedbackStore(database), BatchStore(database)
        for number in (1, 2, 3):
            self.feedback.add(record(number), [Lesson("example", b'{"text":"%d"}' % number)])
        self.settings = GatewaySettings(run_dir=tmp_path, feedback_batch_size=2, feedback_batch_after_s=0.0)

    def publisher(self) -> FeedbackPublisher:
        return FeedbackPublisher(self.settings, bus=self.bus, clock=SystemClock(), store=self.store)

    @property
    def published(self) -> list[bytes]:
        return [body for body, _ in self.broker.streams[STREAM.name].messages]


@pytest.fixture
async def run(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    await run.bus.ensure_stream(STREAM)
    return run


async def test_batches_whose_acknowledgement_is_lost_are_stored_once(run: Run) -> None:
    task = asyncio.create_task(run.publisher().run())
    await until(lambda: [state.status for state in run.store.states()] == ["published", "published"])
    task.cancel()
    assert [state.sequence for state in run.store.states()] == [1, 2]
    assert [body.count(b'"text"') for body in run.published] == [2, 1]


async def test_a_gateway_that_dies_at_a_batch_publishes_the_same_one_after_its_restart(run: Run) -> None:
    """It is in the stream, and the file does not know; another correction has come since."""
    run.store.assign(run.store.waiting("example", 2))
    (batch,) = run.store.to_publish()
    run.bus.num_lost = 0
    await run.bus.publish_durable("lemix.train.batches", batch.body, message_id=batch.id)
    run.feedback.add(record(4), [Lesson("example", b'{"text":"4"}')])
    task = asyncio.create_task(run.publisher().run())
    await until(lambda: [state.status for state in run.store.states()] == ["published", "published"])
    task.cancel()
    assert run.published[0] == batch.body
    assert [body.count(b'"text"') for body in run.published] == [2, 2]


async def test_news_that_come_while_older_ones_are_written_are_written_too(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.bus.num_lost = 0
    write, is_writing, may_write = run.store.write_states, threading.Event(), threading.Event()

    def wait_and_write(states: Sequence[BatchState]) -> None:
        is_writing.set()
        assert may_write.wait(DEADLINE_S)
        write(states)

    monkeypatch.setattr(run.store, "write_states", wait_and_write)
    task = asyncio.create_task(run.publisher().run())
    await until(is_writing.is_set)
    first = run.store.states()[0].id
    applied = BatchApplied(batch_id=first, node=0, version=7, loss=1.0, num_tokens=3)
    await run.bus.publish(TRAIN_PROGRESS.at(), BatchProgress(event=applied))
    for _ in range(20):  # until it has been heard
        await asyncio.sleep(0)
    may_write.set()
    await until(lambda: run.store.states()[0] == BatchState(first, "applied", 1, 7))
    task.cancel()


async def test_what_the_disk_refused_is_written_later(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.bus.num_lost = 0
    write, num_refused = run.store.write_states, 2

    def refuse(states: Sequence[BatchState]) -> None:
        nonlocal num_refused
        if num_refused:
            num_refused -= 1
            raise sqlite3.OperationalError("database or disk is full")
        write(states)

    monkeypatch.setattr(run.store, "write_states", refuse)
    task = asyncio.create_task(run.publisher().run())
    await until(lambda: [state.status for state in run.store.states()] == ["published", "published"])
    task.cancel()
    assert len(run.published) == 2


async def test_of_many_batches_the_oldest_that_are_finished_are_heard_of_no_longer(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "MAX_KNOWN", 1)
    run.bus.num_lost = 0
    working = run.publisher()
    task = asyncio.create_task(working.run())
    await until(lambda: [state.status for state in run.store.states()] == ["published", "published"])
    first, second = (state.id for state in run.store.states())
    durable = BatchDurable(batch_ids=(first, second), node=0, version=2, checkpoint="/c")
    await run.bus.publish(TRAIN_PROGRESS.at(), BatchProgress(event=durable))
    await until(lambda: first not in working._states)
    for batch_id in (first, second):
        rejected = BatchProgress(event=BatchRejected(batch_id=batch_id, reason="rolled back"))
        await run.bus.publish(TRAIN_PROGRESS.at(), rejected)
    await until(lambda: run.store.states()[1].status == "rejected")
    assert run.store.states()[0].status == "durable"
    task.cancel()


async def test_a_rollback_whose_news_is_lost_is_learnt_by_asking(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "ASK_DURABLE_EVERY_S", 0.0)
    run.bus.num_lost = 0
    is_rolled_back = False

    async def answer(incoming: Incoming[BatchesAsked]) -> BatchesNow:
        ids = incoming.message.batch_ids
        durable: tuple[BatchEvent, ...] = (BatchDurable(batch_ids=ids, node=0, version=2, checkpoint="/c"),)
        rejected = tuple(BatchRejected(batch_id=each, reason="rolled back") for each in ids)
        return BatchesNow(events=rejected if is_rolled_back else durable, unknown=(), read_up_to=2)

    await run.bus.respond(TRAIN_STATUS.at(), answer)
    working = run.publisher()
    task = asyncio.create_task(working.run())
    await until(lambda: [state.status for state in run.store.states()] == ["published", "published"])
    ids = tuple(state.id for state in run.store.states())
    durable = BatchDurable(batch_ids=ids, node=0, version=2, checkpoint="/c")
    await run.bus.publish(TRAIN_PROGRESS.at(), BatchProgress(event=durable))
    await until(lambda: [state.status for state in run.store.states()] == ["durable", "durable"])
    is_rolled_back = True
    working.changed.set()
    await until(lambda: [state.status for state in run.store.states()] == ["rejected", "rejected"])
    task.cancel()


async def test_a_batch_that_can_never_be_published_is_rejected_and_the_next_one_goes_on(run: Run) -> None:
    """The bus takes smaller messages than when the correction came."""
    run.bus.num_lost = 0
    run.store.assign(run.store.waiting("example", 2))
    run.store.assign(run.store.waiting("example", 2))
    large, small = run.store.to_publish()
    run.bus.max_message_bytes = len(large.body) - 1
    task = asyncio.create_task(run.publisher().run())
    await until(lambda: [state.status for state in run.store.states()] == ["rejected", "published"])
    task.cancel()
    assert str(len(large.body)) in run.store.states()[0].reason
    assert run.published == [small.body]
