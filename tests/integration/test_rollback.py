"""Going back to an older durable version while the trainer runs, on the memory bus with scripted nodes."""

import asyncio
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from services.trainer.checkpoints import rollback_files
from services.trainer.ledger.progress import DISCARDED
from shared import checkpoints
from shared.bus.base import Incoming
from shared.errors import RefusedError
from shared.messages.inference import InferenceTask, SequenceResult, TokenLogprob, TokensProduced
from shared.messages.lineage import LineageEntryRequest, LineageRequest
from shared.messages.training import BatchesAsked, BatchRejected
from shared.messages.weights import DurableVersion, DurableVersionsRequest, RollBackWeights, RolledBack
from shared.subjects import (
    ASSIGN,
    DURABLE_VERSIONS,
    LINEAGE,
    LINEAGE_ENTRY,
    ROLLBACK,
    TOKENS,
    TRAIN_STATUS,
)
from tests.integration.test_trainer_service import DEADLINE_S, Cluster, Killed, stop
from tests.support.waiting import until


@pytest.fixture
async def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


async def roll_back(
    cluster: Cluster, version: int, node: int | None = None, *, timeout_s: float = DEADLINE_S
) -> RolledBack:
    message = RollBackWeights(version=version, node=node)
    return await cluster.bus.request(ROLLBACK.at(), message, timeout_s=timeout_s)


async def listed(cluster: Cluster) -> tuple[DurableVersion, ...]:
    return (
        await cluster.bus.request(DURABLE_VERSIONS.at(), DurableVersionsRequest(), timeout_s=DEADLINE_S)
    ).versions


async def lineage(cluster: Cluster, version: int) -> list[str]:
    """The batches that the version has learnt, as the trainer tells."""
    found = await cluster.bus.request(LINEAGE.at(), LineageRequest(version=version), timeout_s=DEADLINE_S)
    entries = [found.newest]
    while (place := entries[-1].older) is not None:
        asked = LineageEntryRequest(place=place)
        entries.append(await cluster.bus.request(LINEAGE_ENTRY.at(), asked, timeout_s=DEADLINE_S))
    assert entries[-1].num_before == 0
    return [batch.id for entry in reversed(entries) for batch in entry.batches]


async def rejections(cluster: Cluster) -> dict[str, str]:
    """What the trainer answers to publishers of three batches."""
    return await rejections_of(cluster, "a", "b", "c")


async def rejections_of(cluster: Cluster, *batch_ids: str) -> dict[str, str]:
    asked = BatchesAsked(batch_ids=batch_ids)
    now = await cluster.bus.request(TRAIN_STATUS.at(), asked, timeout_s=DEADLINE_S)
    assert now.unknown == ()
    return {each.batch_id: each.reason for each in now.events if isinstance(each, BatchRejected)}


async def train(cluster: Cluster, *batch_ids: str) -> None:
    """One durable version for each batch."""
    for batch_id in batch_ids:
        await cluster.publish(batch_id)
        await cluster.news.until(partial(lambda one: one in cluster.durable(), batch_id))


def contents(cluster: Cluster) -> list[list[str]]:
    return [stage.contents for node in cluster.nodes for stage in node.stages]


async def test_batches_of_newer_versions_are_discarded_and_training_goes_on(cluster: Cluster) -> None:
    await cluster.start()
    trainer = await cluster.trainer(keep_checkpoints=9)
    await train(cluster, "a", "b", "c")
    assert [(each.version, each.newest_batch_id, each.num_ahead) for each in await listed(cluster)] == [
        (3, "c", 0),
        (2, "b", None),
        (1, "a", None),
        (0, "", None),
    ]

    assert await roll_back(cluster, 1) == RolledBack(nodes=(0,), num_discarded=2)

    await cluster.news.until(lambda: contents(cluster) == [["a"], ["a"]])
    assert await rejections(cluster) == {"b": DISCARDED, "c": DISCARDED}
    assert [each.version for each in await listed(cluster)] == [1, 0]
    await cluster.publish("b")
    await train(cluster, "d")
    assert cluster.durable() == await lineage(cluster, 2) == ["a", "d"]
    await stop(trainer)

    trainer = await cluster.trainer(keep_checkpoints=9)
    assert await rejections(cluster) == {"b": DISCARDED, "c": DISCARDED}
    await cluster.publish("c")
    await train(cluster, "e")
    assert cluster.durable() == await lineage(cluster, 3) == ["a", "d", "e"]
    with pytest.raises(RefusedError, match="no durable version 4"):
        await lineage(cluster, 4)
    await cluster.news.until(lambda: len(set(cluster.acked)) == 7)
    await stop(trainer)


async def test_nodes_go_back_to_the_model_as_it_was_given_and_train_on_from_there(cluster: Cluster) -> None:
    """Version 0 needs no checkpoint: neither one of its own, nor any other."""
    await cluster.start()
    trainer = await cluster.trainer()
    await train(cluster, "a", "b")

    assert await roll_back(cluster, 0) == RolledBack(nodes=(0,), num_discarded=2)

    await cluster.news.until(lambda: contents(cluster) == [[], []])
    assert await rejections_of(cluster, "a", "b") == {"a": DISCARDED, "b": DISCARDED}
    assert [(each.version, each.num_ahead) for each in await listed(cluster)] == [(0, 0)]
    await stop(trainer)

    trainer = await cluster.trainer()
    await cluster.publish("a")
    await train(cluster, "c")
    assert cluster.durable() == ["c"]
    assert await roll_back(cluster, 0) == RolledBack(nodes=(0,), num_discarded=1)
    await stop(trainer)


async def test_a_node_that_has_no_checkpoint_yet_can_go_back_to_version_0(cluster: Cluster) -> None:
    await cluster.start()
    trainer = await cluster.trainer(checkpoint_idle_s=100, checkpoint_every=100)
    await cluster.publish("a")
    await cluster.news.until(lambda: "a" in cluster.ended)

    assert await roll_back(cluster, 0) == RolledBack(nodes=(0,), num_discarded=1)

    await cluster.news.until(lambda: contents(cluster) == [[], []])
    await stop(trainer)


async def test_what_was_applied_and_not_durable_is_discarded_and_what_waits_is_not(cluster: Cluster) -> None:
    await cluster.start()
    trainer = await cluster.trainer(keep_checkpoints=9)
    await train(cluster, "a", "b")
    await stop(trainer)
    trainer = await cluster.trainer(keep_checkpoints=9, checkpoint_idle_s=100, checkpoint_every=100)
    await cluster.publish("c")
    await cluster.news.until(lambda: "c" in cluster.nodes[0].stages[0].contents)
    await cluster.news.until(lambda: "c" in cluster.ended)

    assert await roll_back(cluster, 1) == RolledBack(nodes=(0,), num_discarded=2)

    await stop(trainer)
    trainer = await cluster.trainer(keep_checkpoints=9)
    await train(cluster, "d")
    assert cluster.durable() == ["a", "d"]
    await stop(trainer)


def die_at(place: str, monkeypatch: pytest.MonkeyPatch, *, runs_first: bool) -> None:
    """The trainer dies where it touches the files of a rollback, before or after."""
    plain = getattr(rollback_files, place)

    def broken(*arguments: Any) -> None:
        if runs_first:
            plain(*arguments)
        raise Killed

    monkeypatch.setattr(rollback_files, place, broken)


@pytest.mark.parametrize("place", ["intend", "complete"])
@pytest.mark.parametrize("runs_first", [False, True])
async def test_a_trainer_that_dies_while_it_goes_back_has_gone_back_or_not(
    cluster: Cluster, place: str, runs_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.start()
    trainer = await cluster.trainer(keep_checkpoints=9)
    await train(cluster, "a", "b", "c")
    die_at(place, monkeypatch, runs_first=runs_first)
    with pytest.raises(Exception, match="no answer within"):
        await roll_back(cluster, 1, timeout_s=0.01)
    await cluster.news.until(trainer.done)
    assert isinstance(trainer.exception(), ExceptionGroup)
    monkeypatch.undo()

    trainer = await cluster.trainer(keep_checkpoints=9)
    await train(cluster, "d")
    is_decided = (place, runs_first) != ("intend", False)
    assert cluster.durable() == (["a", "d"] if is_decided else ["a", "b", "c", "d"])
    await stop(trainer)


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rollback can be noted down."""

    def full(*arguments: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(rollback_files, "intend", full)


async def test_a_full_disk_leaves_the_weights_as_they_were(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.start()
    trainer = await cluster.trainer(keep_checkpoints=9)
    await train(cluster, "a", "b")

    fill_disk(monkeypatch)
    with pytest.raises(RefusedError, match="nothing was rolled back: no space left"):
        await roll_back(cluster, 1)
    await train(cluster, "c")
    assert cluster.durable() == ["a", "b", "c"]
    await stop(trainer)


async def test_versions_and_nodes_that_do_not_exist_are_named_with_those_that_do(cluster: Cluster) -> None:
    await cluster.start()
    trainer = await cluster.trainer(keep_checkpoints=9)
    await train(cluster, "a", "b")

    with pytest.raises(RefusedError, match="node 0: no durable version 7; there are: 2, 1"):
        await roll_back(cluster, 7)
    with pytest.raises(RefusedError, match=r"node 4 is not running; those that are: \[0\]"):
        await roll_back(cluster, 1, node=4)
    assert cluster.durable() == ["a", "b"]
    await stop(trainer)


async def test_one_node_of_two_goes_back(cluster: Cluster) -> None:
    await cluster.start(2)
    trainer = await cluster.trainer(keep_checkpoints=9)
    await train(cluster, "a", "b", "c", "d")
    other = cluster.nodes[1].stages[0].contents

    assert await roll_back(cluster, 1, node=0) == RolledBack(nodes=(0,), num_discarded=1)

    await cluster.news.until(lambda: len(cluster.nodes[0].stages[0].contents) == 1)
    assert cluster.nodes[1].stages[0].contents == other
    await train(cluster, "e", "f")
    assert sorted(cluster.durable()) == sorted({"a", "b", "c", "d", "e", "f"} - cluster.discarded())
    assert len(cluster.discarded()) == 1
    await stop(trainer)


async def test_of_requests_at_the_same_time_one_is_answered_and_the_others_are_refused(
    cluster: Cluster,
) -> None:
    await cluster.start()
    trainer = await cluster.trainer(keep_checkpoints=9)
    await train(cluster, "a", "b", "c")

    asked = (roll_back(cluster, version) for version in (1, 2, 1, 2))
    answers = await asyncio.gather(*asked, return_exceptions=True)

    assert answers[0] == RolledBack(nodes=(0,), num_discarded=2)
    assert [getattr(answer, "code", None) for answer in answers[1:]] == [409, 409, 409]
    await train(cluster, "d")
    assert cluster.durable() == ["a", "d"]
    await stop(trainer)


async def score(cluster: Cluster, scores: Callable[[int], bool]) -> None:
    """Have node 0 answer evaluations of those versions: every token is as likely as any other."""

    async def answer(incoming: Incoming[InferenceTask]) -> None:
        task = incoming.message
        if not scores(task.weights_version or 0):
            return
        told = tuple(TokenLogprob(token=token, logprob=-1.0) for token in task.prompt[1:])
        result = SequenceResult(task_id=task.task_id, prompt=told, index=0, finish="length")
        produced = TokensProduced(node=0, weights_version=task.weights_version or 0, results=(result,))
        await cluster.bus.publish(TOKENS.at(gateway=task.gateway), produced)

    await cluster.bus.subscribe(ASSIGN.at(node=0), answer)


async def test_a_version_number_that_comes_again_has_no_held_out_loss_of_the_one_before(
    cluster: Cluster, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"token_ids": [1, 2, 3]}))
    is_back = False
    await cluster.start()
    await score(cluster, lambda version: not is_back)
    trainer = await cluster.trainer(
        keep_checkpoints=9, held_out=str(held_out), evaluate_every=1, max_kept_versions=9
    )
    await train(cluster, "a", "b")
    manifest = partial(checkpoints.read, cluster.folder / "checkpoints" / "node-0" / "step-00000002")
    await until(lambda: (read := manifest()) and read.held_out_loss is not None)

    is_back = True
    await roll_back(cluster, 1)
    await train(cluster, "c", "d")  # when d is durable, all is said of c
    await stop(trainer)

    again = manifest()
    assert again is not None
    assert (again.recent_batch_ids, again.held_out_loss) == (("a", "c"), None)
