"""What was in a rejected batch can be read back, whatever happens meanwhile, and be published again."""

import json
from pathlib import Path
from typing import Any

import msgpack
import pytest
from rich.console import Console

from lemix.printing import print_table
from lemix.rejected_command import content_of, rejections_table
from services.trainer.streams import TRAIN_STREAM
from shared.bus.base import Stored
from shared.bus.memory import MemoryBus
from shared.errors import ConfigurationError
from shared.subjects import REJECTED
from tests.integration.test_trainer_service import EXAMPLES, Cluster, Killed, stop

AS_TEXT = ' {"id": "nan",\n "examples": [{"text": "\u00e9 \\" \\u00e9"}, {"token_ids": [1, 2]}]}\n'.encode()
AS_MESSAGEPACK = msgpack.packb({"id": "nan", "examples": [{"token_ids": [1, 300, 2]}, {"text": "a"}]})


@pytest.fixture
async def cluster(tmp_path: Path) -> Cluster:
    """Its node finds that the batch `nan` has no finite gradients."""
    cluster = Cluster(tmp_path)
    await cluster.start()
    cluster.nodes[0].diverging.add("nan")
    return cluster


async def until_purged(cluster: Cluster) -> None:
    """Train on a further batch, and wait until the stream holds neither that nor any before it."""
    last = await cluster.publish("later")
    stream = cluster.broker.streams[TRAIN_STREAM.name]
    await cluster.news.until(lambda: stream.num_removed == last)


@pytest.mark.parametrize("body", [AS_TEXT, AS_MESSAGEPACK], ids=["text", "messagepack"])
@pytest.mark.parametrize("is_stored", [False, True], ids=["before", "after"])
async def test_what_was_published_is_kept_though_the_trainer_dies_around_its_storing(
    cluster: Cluster, is_stored: bool, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, deaths = MemoryBus.publish_durable, iter([True])

    async def dying(bus: MemoryBus, subject: str, body: bytes, **more: Any) -> Stored | None:
        dies = subject == REJECTED and next(deaths, False)
        stored = await store(bus, subject, body, **more) if is_stored or not dies else None
        if dies:
            raise Killed
        return stored

    monkeypatch.setattr(MemoryBus, "publish_durable", dying)
    sequence = await cluster.publish("nan", body)
    first = await cluster.trainer()
    await cluster.news.until(first.done)
    assert isinstance(first.exception(), ExceptionGroup)
    assert cluster.acked == []

    second = await cluster.trainer(keep_checkpoints=1)
    await cluster.news.until(lambda: cluster.acked == [sequence])
    await until_purged(cluster)
    await stop(second)

    (rejected,) = cluster.rejected()
    assert rejected.reason.startswith("its gradients are not finite")
    assert await content_of(cluster.bus, sequence) == body
    assert cluster.durable() == ["later"]


async def test_a_batch_that_failed_twice_or_cannot_be_read_is_kept_too(cluster: Cluster) -> None:
    cluster.nodes[0].poison = "poison"
    poison = json.dumps({"id": "poison", "examples": EXAMPLES}).encode()
    bodies = {await cluster.publish("poison", poison): poison, await cluster.publish("bad", b"{"): b"{"}
    trainer = await cluster.trainer()
    await cluster.news.until(lambda: len(cluster.acked) == 2)
    await stop(trainer)

    assert {sequence: await content_of(cluster.bus, sequence) for sequence in bodies} == bodies


@pytest.mark.parametrize("wrong", [{"colour": 1}, {"examples": []}, {"learning_rate_multiplier": "much"}])
async def test_a_batch_with_a_wrong_field_is_told_of_under_its_own_id(
    cluster: Cluster, wrong: dict[str, object]
) -> None:
    body = json.dumps({"id": "mine", "examples": EXAMPLES} | wrong).encode()
    sequence = await cluster.publish("mine", body)
    trainer = await cluster.trainer()
    await cluster.news.until(lambda: cluster.acked == [sequence] and len(cluster.progress) > 0)
    await stop(trainer)

    (rejected,) = cluster.rejected()
    assert (rejected.batch_id, rejected.sequence) == ("mine", sequence)
    assert next(iter(wrong)) in rejected.reason
    assert [event.batch_id for event in cluster.progress] == ["mine"]
    with (console := Console(width=200)).capture() as shown:
        print_table(console, await rejections_table(cluster.bus, "run one"))
    assert [str(sequence), "mine"] in [line.split()[:2] for line in shown.get().splitlines()]


async def test_what_was_rejected_can_be_published_again_under_a_new_id(cluster: Cluster) -> None:
    sequence = await cluster.publish("nan", AS_TEXT)
    trainer = await cluster.trainer()
    await cluster.news.until(lambda: cluster.acked == [sequence])
    again = json.loads(await content_of(cluster.bus, sequence)) | {"id": "again"}
    await cluster.publish("again", json.dumps(again).encode())
    await cluster.until_durable(1)
    await stop(trainer)

    assert cluster.durable() == ["again"]


async def test_a_batch_that_does_not_fit_beside_its_reason_is_rejected_all_the_same(cluster: Cluster) -> None:
    sequence = await cluster.publish("large", b"{" + b'"' * (cluster.bus.max_message_bytes - 1))
    trainer = await cluster.trainer()
    await cluster.news.until(lambda: cluster.acked == [sequence])
    await stop(trainer)

    (rejected,) = cluster.rejected()
    assert "Invalid JSON" in rejected.reason
    with pytest.raises(ConfigurationError, match="the training stream may still hold it, at sequence 1"):
        await content_of(cluster.bus, sequence)
    with pytest.raises(ConfigurationError, match="no batch at sequence 7"):
        await content_of(cluster.bus, 7)
