"""The trainer on the memory bus, with nodes played by a script: what is durable contains each batch once."""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from shutil import copyfile
from typing import Any

import msgpack
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.trainer.checkpoints.files import CheckpointFiles
from services.trainer.ledger import rejections
from services.trainer.service import Trainer
from services.trainer.settings import TrainerSettings
from services.trainer.streams import TRAIN_STREAM
from shared import checkpoints
from shared.bus.base import TRACE_HEADER, Handler, Incoming, Stored, StreamMessage, StreamReader, Subscription
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.errors import BusError, ConfigurationError, RefusedError
from shared.messages.inference import Placed, TaskEnded
from shared.messages.training import (
    BatchApplied,
    BatchDurable,
    BatchesAsked,
    BatchesNow,
    BatchEvent,
    BatchPlaced,
    BatchProgress,
    BatchRejected,
    RejectedBatch,
    TrainingTask,
)
from shared.settings import EMBEDDED_MODEL
from shared.subjects import (
    BATCHES,
    ENDED,
    HEARTBEAT,
    PLACE,
    REJECTED,
    TRAIN_PROGRESS,
    TRAIN_STATUS,
    Subject,
)
from shared.telemetry import Telemetry
from tests.support.fake_node import FakeNode, Meeting, read_shard

DEADLINE_S = 60.0
TRACE_ID = "1" * 32
TRACE = f"00-{TRACE_ID}-{'2' * 16}-01"
EXAMPLES = [{"token_ids": [1, 2, 3]}, {"token_ids": [4, 5, 6, 7]}, {"token_ids": [8, 9]}]


class Killed(Exception):
    """Stands for `kill -9` at this very place."""


class SetClock:
    """Stands still until a case moves it."""

    def __init__(self) -> None:
        self.time_s = 1000.0

    def now_s(self) -> float:
        return self.time_s

    def wall_s(self) -> float:
        return self.time_s


class News:
    """Something has happened: look again."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        self._event.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._event.clear()
                await self._event.wait()


class WatchedReader:
    """Tells which messages are acknowledged."""

    def __init__(self, reader: StreamReader, acked: Callable[[int], None]) -> None:
        self._reader = reader
        self._acked = acked

    async def next(self, *, timeout_s: float) -> StreamMessage | None:
        found = await self._reader.next(timeout_s=timeout_s)
        return None if found is None else replace(found, ack=self._ack(found.sequence))

    def _ack(self, sequence: int) -> Callable[[], Awaitable[None]]:
        async def ack() -> None:
            self._acked(sequence)

        return ack

    async def close(self) -> None:
        await self._reader.close()


class WatchedBus(MemoryBus):
    """The trainer's bus."""

    def __init__(self, broker: MemoryBroker, acked: Callable[[int], None]) -> None:
        super().__init__(broker, "")
        self.listens = asyncio.Event()
        self.on_purge: Callable[[], None] = lambda: None
        self._acked = acked

    async def subscribe(
        self, subject: Subject[Any], handler: Handler[Any], *, queue: str = ""
    ) -> Subscription:
        subscription = await super().subscribe(subject, handler, queue=queue)
        if subject.name == HEARTBEAT.at().name:
            self.listens.set()
        return subscription

    async def purge_stream(self, stream: str, up_to_sequence: int) -> None:
        await super().purge_stream(stream, up_to_sequence)
        self.on_purge()

    async def read_stream(self, stream: str, *, reader: str, after_sequence: int) -> StreamReader:
        plain = await super().read_stream(stream, reader=reader, after_sequence=after_sequence)
        return WatchedReader(plain, self._acked)


class Cluster:
    """Nodes, a scheduler that takes turns, publishers, and a trainer that may die."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = MemoryBroker()
        self.bus = self.broker.connect()
        self.clock = SetClock()
        self.news = News()
        self.nodes: list[FakeNode] = []
        self.meeting = Meeting()
        self.acked: list[int] = []
        self.ended: list[str] = []
        self.placements: list[str] = []
        self.progress: list[BatchEvent] = []
        self.refuse_placement: Callable[[], str] = lambda: ""
        self.spans = InMemorySpanExporter()
        self._id_by_sequence: dict[int, str] = {}

    async def start(self, num_nodes: int = 1, num_stages: int = 2) -> None:
        await self.bus.ensure_stream(TRAIN_STREAM)
        for number in range(num_nodes):
            node = FakeNode(self.bus, number, num_stages, self.meeting)
            node.happened = lambda turn: self.news.tell()
            self.nodes.append(node)
            await node.start()

        async def place(incoming: Incoming[TrainingTask]) -> Placed:
            if reason := self.refuse_placement():
                raise RefusedError(reason)
            self.placements.append(incoming.message.task_id)
            return Placed(node=len(self.placements) % num_nodes)

        async def ended(incoming: Incoming[TaskEnded]) -> None:
            self.ended.extend(incoming.message.task_ids)
            self.news.tell()

        async def progress(incoming: Incoming[BatchProgress]) -> None:
            self.progress.append(incoming.message.event)
            self.news.tell()

        await self.bus.respond(PLACE.at(), place)
        await self.bus.subscribe(ENDED.at(), ended)
        await self.bus.subscribe(TRAIN_PROGRESS.at(), progress)

    async def publish(self, batch_id: str, body: bytes | None = None, **headers: str) -> int:
        packed = body or json.dumps({"id": batch_id, "examples": EXAMPLES}).encode()
        sequence = (await self.bus.publish_durable(BATCHES, packed, headers=headers)).sequence
        self._id_by_sequence[sequence] = batch_id
        return sequence

    async def trainer(self, buses: list[MemoryBus] | None = None, **changes: Any) -> "asyncio.Task[None]":
        """A trainer that has heard of all nodes; its bus is added to `buses`."""
        fields = {"run_dir": self.folder, "checkpoint_idle_s": 0.0, "microbatches": 2, **changes}
        bus = WatchedBus(self.broker, self._on_ack)
        bus.on_purge = self.news.tell
        if buses is not None:
            buses.append(bus)
        telemetry = Telemetry("trainer", None)
        telemetry._provider.add_span_processor(SimpleSpanProcessor(self.spans))
        trainer = Trainer(TrainerSettings(**fields), bus=bus, clock=self.clock, telemetry=telemetry)
        task = asyncio.create_task(trainer.run())
        task.add_done_callback(lambda done: self.news.tell())
        async with asyncio.timeout(DEADLINE_S):
            await bus.listens.wait()
        await self.beat()
        return task

    async def beat(self) -> None:
        for node in self.nodes:
            await node.beat()

    def durable(self) -> list[str]:
        """Batches in the newest checkpoints of all nodes."""
        found = []
        for node in self.nodes:
            checkpoint = checkpoints.latest(self.folder / "checkpoints", node.node)
            if checkpoint and checkpoint.manifest.version:
                per_stage = [read_shard(checkpoint.folder, stage) for stage in range(len(node.stages))]
                assert all(contents == per_stage[0] for contents in per_stage)
                assert checkpoint.manifest.version == len(per_stage[0])
                assert list(checkpoint.manifest.recent_batch_ids) == per_stage[0]
                found += per_stage[0]
        return found

    def discarded(self) -> set[str]:
        """Batches that the newest checkpoints say were gone back from."""
        root = self.folder / "checkpoints"
        found = (checkpoints.latest(root, node.node) for node in self.nodes)
        return {batch_id for each in found if each for batch_id in each.manifest.discarded_batch_ids}

    def rejected(self) -> list[RejectedBatch]:
        stream = self.broker.streams.get("LEMIX_REJECTED")
        return [RejectedBatch.model_validate_json(body) for body, _ in stream.messages] if stream else []

    async def ask(self, *batch_ids: str) -> BatchesNow:
        question = BatchesAsked(batch_ids=batch_ids)
        return await self.bus.request(TRAIN_STATUS.at(), question, timeout_s=DEADLINE_S)

    async def until_durable(self, num_batches: int) -> None:
        await self.news.until(lambda: len(self.durable()) >= num_batches)

    def _on_ack(self, sequence: int) -> None:
        refused = {each.sequence for each in self.rejected()}
        batch_id = self._id_by_sequence[sequence]
        assert sequence in refused or batch_id in self.durable() or batch_id in self.discarded()
        self.acked.append(sequence)
        self.news.tell()


@pytest.fixture
async def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


async def stop(trainer: "asyncio.Task[None]") -> None:
    trainer.cancel()
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.wait([trainer])
    assert trainer.cancelled()


async def test_batches_of_both_formats_reach_the_weights_and_the_disk(cluster: Cluster) -> None:
    await cluster.start()
    await cluster.publish("j")
    await cluster.publish("m", msgpack.packb({"id": "m", "examples": EXAMPLES}))
    await cluster.publish("h", json.dumps({"examples": [{"text": "hello"}]}).encode(), **{"Nats-Msg-Id": "h"})
    await cluster.publish("seq-4", json.dumps({"examples": [{"token_ids": [1, 2]}]}).encode())
    trainer = await cluster.trainer()
    await cluster.until_durable(4)
    await cluster.news.until(lambda: len(cluster.acked) == 4 and len(cluster.ended) == 4)
    await stop(trainer)

    assert cluster.durable() == ["j", "m", "h", "seq-4"]
    assert cluster.rejected() == []
    first, second = (message.microbatch for message in cluster.nodes[0].microbatches[:2])
    assert (first.lengths, second.lengths) == ((3,), (4, 2))
    assert second.label_rows == (0, 1, 2, 4)
    assert second.labels == (5, 6, 7, 9)
    assert first.loss_weight == second.loss_weight == 1 / 6
    assert cluster.nodes[0].microbatches[1].tokens == (4, 5, 6, 7, 8, 9)


async def test_a_batch_published_twice_is_applied_once(cluster: Cluster) -> None:
    await cluster.start()
    for batch_id in ("a", "a", "b"):
        await cluster.publish(batch_id)
    trainer = await cluster.trainer()
    await cluster.until_durable(2)
    await cluster.publish("a")
    await cluster.publish("c")
    await cluster.until_durable(3)
    await cluster.news.until(lambda: len(cluster.acked) == 5)
    await stop(trainer)

    trainer = await cluster.trainer()
    await cluster.publish("b")
    await cluster.publish("d")
    await cluster.until_durable(4)
    await stop(trainer)

    assert cluster.durable() == ["a", "b", "c", "d"]


async def test_a_bad_batch_is_rejected_with_the_reason_and_the_others_go_on(cluster: Cluster) -> None:
    await cluster.start()
    await cluster.publish("a")
    await cluster.publish("seq-2", b'{"examples": [')
    await cluster.publish("x", b'{"id": "x", "examples": [{"token_ids": [1, 99999]}]}')
    await cluster.publish("b")
    trainer = await cluster.trainer()
    await cluster.until_durable(2)
    await cluster.news.until(lambda: len(cluster.acked) == 4)
    await stop(trainer)

    assert cluster.durable() == ["a", "b"]
    assert [(each.batch_id, each.sequence) for each in cluster.rejected()] == [("seq-2", 2), ("x", 3)]
    assert "Invalid JSON" in cluster.rejected()[0].reason
    assert cluster.rejected()[1].reason == "examples.0: token id 99999 is not in 0..4095"


async def test_a_batch_whose_computation_fails_is_rejected_and_the_others_run_again(cluster: Cluster) -> None:
    await cluster.start()
    cluster.nodes[0].poison = "p"
    for batch_id in ("a", "p", "b"):
        await cluster.publish(batch_id)
    trainer = await cluster.trainer(checkpoint_idle_s=100)
    await cluster.news.until(lambda: bool(cluster.rejected()) and cluster.ended.count("b") > 0)
    await cluster.news.until(lambda: sorted(cluster.nodes[0].stages[0].contents) == ["a", "b"])
    await stop(trainer)

    assert [(each.batch_id, each.reason) for each in cluster.rejected()] == [("p", "stage 1 failed: NaN")]
    assert len(cluster.nodes[0].restores) == 2 * 3, "one restore of both stages after each of two failures"


async def test_a_fault_of_the_node_rejects_no_batch_however_often_it_comes(cluster: Cluster) -> None:
    await cluster.start()
    cluster.nodes[0].num_faults = 3
    await cluster.publish("a")
    trainer = await cluster.trainer()
    await cluster.until_durable(1)
    await stop(trainer)

    assert (cluster.durable(), cluster.rejected()) == (["a"], [])


async def test_a_batch_that_fails_once_is_tried_again(cluster: Cluster) -> None:
    await cluster.start()
    node = cluster.nodes[0]
    node.poison = "p"

    def mend(turn: str) -> None:
        if turn == "restore" and len(node.restores) > 2:
            node.poison = ""
        cluster.news.tell()

    node.happened = mend
    await cluster.publish("p")
    trainer = await cluster.trainer()
    await cluster.until_durable(1)
    await stop(trainer)

    assert (cluster.durable(), cluster.rejected()) == (["p"], [])


async def test_a_batch_is_done_with_only_when_its_rejection_is_stored(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rejections, "RETRY_S", 0.0)
    stored, refusals = MemoryBus.publish_durable, iter([True, True])
    watermarks = []

    async def publish(bus: MemoryBus, subject: str, body: bytes, **more: Any) -> Stored:
        if subject == REJECTED:
            await cluster.until_durable(1)
            (checkpoint,) = checkpoints.checkpoints(cluster.folder / "checkpoints", 0)
            watermarks.append(checkpoint.manifest.watermark)
            if next(refusals, False):
                raise BusError("no")
        return await stored(bus, subject, body, **more)

    monkeypatch.setattr(MemoryBus, "publish_durable", publish)
    await cluster.start()
    await cluster.publish("bad", b"{")
    await cluster.publish("a")
    trainer = await cluster.trainer()
    await cluster.news.until(lambda: len(cluster.acked) == 2)
    await stop(trainer)

    assert watermarks == [0, 0, 0]
    assert [each.sequence for each in cluster.rejected()] == [1]


async def test_what_every_checkpoint_contains_leaves_the_stream(cluster: Cluster) -> None:
    await cluster.start()
    stream = cluster.broker.streams[TRAIN_STREAM.name]
    trainer = await cluster.trainer(keep_checkpoints=2)
    for number in range(1, 5):
        await cluster.publish(f"b{number}")
        await cluster.until_durable(number)
    await cluster.news.until(lambda: stream.num_removed == 3)
    await stop(trainer)

    oldest = checkpoints.checkpoints(cluster.folder / "checkpoints", 0)[1].manifest
    assert (oldest.version, oldest.watermark) == (3, 3), "older ones are only for going back"
    trainer = await cluster.trainer()
    await cluster.publish("b5")
    await cluster.until_durable(5)
    await stop(trainer)


async def test_a_new_run_may_begin_after_what_the_stream_holds(cluster: Cluster) -> None:
    await cluster.start()
    await cluster.publish("of an earlier run")
    trainer = await cluster.trainer(train_from="next")
    await stop(trainer)
    await cluster.publish("a")
    trainer = await cluster.trainer(train_from="next")
    await cluster.until_durable(1)
    await stop(trainer)
    await cluster.publish("while it was away")

    trainer = await cluster.trainer(train_from="next")
    await cluster.until_durable(2)
    await stop(trainer)

    assert cluster.durable() == ["a", "while it was away"]


async def test_checkpoints_of_another_stream_end_the_trainer(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.start()
    await cluster.publish("a")
    trainer = await cluster.trainer()
    await cluster.until_durable(1)
    await stop(trainer)

    settings = TrainerSettings(run_dir=tmp_path)
    bus = MemoryBroker().connect()
    other = Trainer(settings, bus=bus, clock=cluster.clock, telemetry=Telemetry("trainer", None))
    with pytest.raises(ConfigurationError, match="another training stream"):
        await other.run()


def test_the_config_of_a_hub_model_is_fetched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(model: str, *, allow_patterns: list[str]) -> str:
        for file in Path(EMBEDDED_MODEL).iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                copyfile(file, tmp_path / file.name)
        return str(tmp_path)

    monkeypatch.setattr("shared.model_files.snapshot_download", fetch)
    settings = TrainerSettings(model="someone/some-model", run_dir=tmp_path)
    Trainer(settings, bus=MemoryBroker().connect(), clock=SetClock(), telemetry=Telemetry("trainer", None))
    assert (tmp_path / "tokenizer.json").exists()
    assert not (tmp_path / "model.safetensors").exists()


TURNS = ["restore", "forward", "backward", "save", "step", "shard"]


@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("nth", [1, 2, 5])
@pytest.mark.parametrize("turn", TURNS)
async def test_a_trainer_that_dies_loses_no_batch_and_applies_none_twice(
    cluster: Cluster, turn: str, nth: int, num_nodes: int
) -> None:
    await cluster.start(num_nodes)
    ids = [f"b{number}" for number in range(7)]
    for batch_id in ids:
        await cluster.publish(batch_id)
    turns: Counter[str] = Counter()
    first: list[asyncio.Task[None]] = []

    def kill(turn_now: str) -> None:
        turns[turn_now] += 1
        if turn_now == turn and turns[turn] == nth:
            first[0].cancel()
        cluster.news.tell()

    for node in cluster.nodes:
        node.happened = kill
    first.append(await cluster.trainer(checkpoint_every=2))
    await cluster.news.until(lambda: first[0].done() or len(cluster.durable()) == len(ids))
    await stop(first[0])

    second = await cluster.trainer(checkpoint_every=2)
    await cluster.until_durable(len(ids))
    await stop(second)

    assert sorted(cluster.durable()) == ids


DISK_PLACES: dict[str, tuple[object, str, bool]] = {
    "before the folder": (CheckpointFiles, "begin", False),
    "before the manifest": (checkpoints, "write", False),
    "before the rename": (Path, "rename", False),
    "after the rename": (CheckpointFiles, "finish", True),
}


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("place", DISK_PLACES)
async def test_a_trainer_that_dies_while_it_writes_a_checkpoint_loses_and_doubles_nothing(
    cluster: Cluster, place: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.start()
    ids = [f"b{number}" for number in range(7)]
    for batch_id in ids:
        await cluster.publish(batch_id)
    break_disk(monkeypatch, place, nth, Killed())
    first = await cluster.trainer(checkpoint_every=2)
    await cluster.news.until(first.done)
    assert isinstance(first.exception(), ExceptionGroup)

    second = await cluster.trainer(checkpoint_every=2)
    await cluster.until_durable(len(ids))
    await stop(second)

    assert sorted(cluster.durable()) == ids


def break_disk(monkeypatch: pytest.MonkeyPatch, place: str, nth: int, error: Exception) -> None:
    """The nth call at this place raises."""
    owner, name, runs_first = DISK_PLACES[place]
    plain = getattr(owner, name)
    calls = iter(range(1, 1000))

    def broken(*args: Any, **kwargs: Any) -> Any:
        is_now = next(calls) == nth
        if is_now and not runs_first:
            raise error
        result = plain(*args, **kwargs)
        if is_now:
            raise error
        return result

    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize("place", ["before the folder", "before the manifest", "before the rename"])
async def test_a_full_disk_leaves_the_old_checkpoint_and_is_tried_again(
    cluster: Cluster, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await cluster.start()
    await cluster.publish("a")
    break_disk(monkeypatch, place, 2, OSError("no space left"))
    trainer = await cluster.trainer()
    await cluster.until_durable(1)
    await cluster.publish("b")
    await cluster.until_durable(2)
    await stop(trainer)

    assert cluster.durable() == ["a", "b"]
    (told,) = [record.message for record in caplog.records if "no checkpoint of version 2" in record.message]
    assert "no space left" in told


async def test_what_was_on_its_way_when_the_connection_broke_runs_again(cluster: Cluster) -> None:
    await cluster.start()
    node = cluster.nodes[0]
    buses: list[MemoryBus] = []
    trainer = await cluster.trainer(buses)
    await cluster.news.until(lambda: len(node.restores) == 2)
    node.stages[1].fence += 1  # deaf to what is sent from now on
    await cluster.publish("a")
    await cluster.news.until(lambda: len(cluster.placements) == 1)

    buses[0].num_reconnects += 1
    await cluster.until_durable(1)
    await stop(trainer)

    assert cluster.durable() == ["a"]


async def test_a_stage_that_cannot_or_will_not_save_is_asked_again(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    await cluster.start()
    node = cluster.nodes[0]
    node.full_disk = True
    await cluster.publish("a")
    trainer = await cluster.trainer()
    await cluster.news.until(lambda: "no space left" in caplog.text or node.stages[0].saves == {1: Path()})
    node.full_disk, node.refuses_saves = False, True
    await cluster.publish("b")
    await cluster.news.until(lambda: node.stages[0].contents == ["a", "b"])
    assert cluster.durable() == []
    node.refuses_saves = False
    await cluster.until_durable(2)
    await stop(trainer)

    assert cluster.durable() == ["a", "b"]


async def test_a_stage_that_restarts_is_restored_and_what_was_not_durable_runs_again(
    cluster: Cluster,
) -> None:
    await cluster.start()
    node = cluster.nodes[0]
    await cluster.publish("a")
    trainer = await cluster.trainer(checkpoint_every=1, checkpoint_idle_s=100)
    await cluster.until_durable(1)
    await stop(trainer)
    trainer = await cluster.trainer(checkpoint_every=100, checkpoint_idle_s=100)
    for batch_id in ("b", "c"):
        await cluster.publish(batch_id)
    await cluster.news.until(lambda: cluster.ended.count("c") == 1)

    node.restart(1)
    await cluster.beat()
    await cluster.news.until(lambda: cluster.ended.count("c") == 2)
    await stop(trainer)

    assert [stage.contents for stage in node.stages] == [["a", "b", "c"]] * 2
    saved = checkpoints.as_saved(checkpoints.latest(cluster.folder / "checkpoints", 0))
    assert saved.checkpoint.endswith("node-0/step-00000001")
    assert [restore.weights for restore in node.restores[-2:]] == [saved, saved]
    assert node.restores[-1].fence > node.restores[-3].fence


async def test_a_node_that_falls_silent_gives_its_batches_to_the_others(cluster: Cluster) -> None:
    await cluster.start(2)
    trainer = await cluster.trainer(checkpoint_idle_s=100)
    for batch_id in ("a", "b", "c", "d"):
        await cluster.publish(batch_id)
    await cluster.news.until(lambda: len(cluster.ended) == 4)
    silent, alive = cluster.nodes

    cluster.clock.time_s += 3.5
    await alive.beat()
    await cluster.news.until(lambda: len(cluster.placements) > 4)
    await silent.beat()
    await cluster.news.until(lambda: len(silent.restores) == 4)
    contents = [node.stages[0] for node in cluster.nodes]
    await cluster.news.until(lambda: sorted(contents[0].contents + contents[1].contents) == list("abcd"))
    await stop(trainer)


async def test_a_placement_is_asked_for_until_there_is_one(cluster: Cluster) -> None:
    await cluster.start()
    answers = iter(["no node is ready", "no node is ready"])
    cluster.refuse_placement = lambda: next(answers, "")
    await cluster.publish("a")
    trainer = await cluster.trainer()
    await cluster.until_durable(1)
    await stop(trainer)

    assert cluster.placements == ["a"]


async def test_a_later_trainer_ends_an_earlier_one(cluster: Cluster) -> None:
    await cluster.start()
    earlier = await cluster.trainer()
    later = await cluster.trainer()
    await cluster.news.until(earlier.done)
    with pytest.RaisesGroup(pytest.RaisesExc(ConfigurationError, match="another trainer has taken over")):
        await earlier
    await cluster.publish("a")
    await cluster.until_durable(1)
    await stop(later)


async def test_a_batch_is_one_trace_from_its_publisher_on(cluster: Cluster) -> None:
    await cluster.start()
    await cluster.publish("a", **{TRACE_HEADER: TRACE})
    trainer = await cluster.trainer()
    await cluster.until_durable(1)
    await stop(trainer)

    (span,) = [span for span in cluster.spans.get_finished_spans() if span.name == "trainer.batch"]
    assert f"{span.get_span_context().trace_id:032x}" == TRACE_ID
    assert span.attributes is not None
    assert span.attributes["lemix.loss"] == pytest.approx(1.0)
    assert cluster.nodes[0].microbatches[0].microbatch.traceparent.split("-")[1] == TRACE_ID


async def test_publishers_hear_what_becomes_of_their_batches(cluster: Cluster) -> None:
    await cluster.start()
    await cluster.publish("a")
    await cluster.publish("x", b'{"id": "x", "examples": [{"token_ids": [1, 99999]}]}')
    trainer = await cluster.trainer()
    await cluster.news.until(lambda: len(cluster.progress) == 4)
    await stop(trainer)

    of_a = [event for event in cluster.progress if not isinstance(event, BatchRejected)]
    placed, applied, durable = of_a
    assert placed == BatchPlaced(batch_id="a", node=0)
    assert applied == BatchApplied(batch_id="a", node=0, version=1, loss=1.0, num_tokens=9)
    folder = checkpoints.latest(cluster.folder / "checkpoints", 0).folder
    assert durable == BatchDurable(batch_ids=("a",), node=0, version=1, checkpoint=str(folder))
    (rejected,) = (event for event in cluster.progress if isinstance(event, BatchRejected))
    assert (rejected.batch_id, "99999" in rejected.reason) == ("x", True)


async def test_who_has_missed_it_is_told_how_batches_stand(cluster: Cluster) -> None:
    await cluster.start()
    await cluster.publish("durable")
    await cluster.publish("also")
    await cluster.publish("x", b'{"examples": []}', **{"Nats-Msg-Id": "x"})
    trainer = await cluster.trainer()
    await cluster.news.until(lambda: len(cluster.durable()) == 2 and len(cluster.acked) == 3)
    await stop(trainer)
    trainer = await cluster.trainer(checkpoint_idle_s=1000)
    await cluster.publish("applied")
    await cluster.news.until(
        lambda: any(isinstance(e, BatchApplied) and e.version == 3 for e in cluster.progress)
    )
    cluster.refuse_placement = lambda: "no node"
    last = await cluster.publish("pending")
    await cluster.publish("y", b'{"examples": []}', **{"Nats-Msg-Id": "y"})
    await cluster.news.until(lambda: len(cluster.rejected()) == 2)
    now = await cluster.ask("durable", "also", "applied", "pending", "x", "y", "never")
    await stop(trainer)

    applied, rejected, durable = now.events
    assert isinstance(durable, BatchDurable) and durable.batch_ids == ("durable", "also")
    assert isinstance(applied, BatchApplied) and (applied.batch_id, applied.version) == ("applied", 3)
    assert isinstance(rejected, BatchRejected) and rejected.batch_id == "y"
    assert now.unknown == ("x", "never"), "an earlier trainer rejected x"
    assert now.read_up_to == last + 1


async def test_a_multiplier_scales_the_learning_rate_of_its_batch(cluster: Cluster) -> None:
    await cluster.start()
    await cluster.publish("a")
    half = {"id": "b", "examples": EXAMPLES, "learning_rate_multiplier": 0.5}
    await cluster.publish("b", json.dumps(half).encode())
    trainer = await cluster.trainer(learning_rate=0.25)
    await cluster.until_durable(2)
    await stop(trainer)

    rates = {order.batch_id: order.learning_rate for order in cluster.nodes[0].orders}
    assert rates == {"a": 0.25, "b": 0.125}
