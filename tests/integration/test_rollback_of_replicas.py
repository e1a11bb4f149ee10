"""Nodes that share their weights go back together while the trainer runs, with nodes played by a script."""

from collections import Counter
from functools import partial
from typing import Any

import pytest

from shared.errors import RefusedError
from shared.messages.weights import RolledBack, SavedWeights
from tests.integration.test_rollback import die_at, fill_disk, listed, roll_back
from tests.integration.test_trainer_merges import Replicas
from tests.integration.test_trainer_merges import replicas as replicas
from tests.integration.test_trainer_service import stop

MERGES = ["average", "outer", "allreduce"]


async def start(replicas: Replicas, merge: str, **changes: Any) -> Any:
    fields = {"merge": merge, "merge_every": 1, "checkpoint_every": 1, "schedule": "1f1b", **changes}
    return await replicas.trainer(keep_checkpoints=9, **fields)


async def train(replicas: Replicas, *batch_ids: str) -> None:
    """One durable version for each batch."""
    for batch_id in batch_ids:
        await replicas.publish(batch_id)
        await replicas.news.until(partial(lambda one: one in replicas.durable(), batch_id))


def assert_all_hold(replicas: Replicas, expected: str) -> None:
    for contents in [replicas.durable(), *replicas.contents()]:
        assert Counter(contents) == Counter(expected)


async def until_all_hold(replicas: Replicas, expected: str) -> None:
    await replicas.news.until(
        lambda: all(sorted(contents) == sorted(expected) for contents in replicas.contents())
    )


@pytest.mark.parametrize("merge", MERGES)
async def test_all_go_back_and_train_on_from_there(replicas: Replicas, merge: str) -> None:
    trainer = await start(replicas, merge)
    async with replicas.beating():
        await train(replicas, *"abcd")

        assert await roll_back(replicas, 2) == RolledBack(nodes=(0, 1), num_discarded=2)

        await until_all_hold(replicas, "ab")
        assert replicas.discarded() == {"c", "d"}
        assert [each.version for each in await listed(replicas) if each.version] == [2, 1]
        await replicas.publish("c")
        await train(replicas, *"ef")
        assert_all_hold(replicas, "abef")
        assert [each.version for each in await listed(replicas) if each.version] == [4, 3, 2, 1]
        await replicas.news.until(lambda: len(set(replicas.acked)) == 7)
    await stop(trainer)

    trainer = await start(replicas, merge)
    async with replicas.beating():
        await replicas.publish("d")
        await train(replicas, "g")
        assert_all_hold(replicas, "abefg")
    await stop(trainer)


async def test_what_each_has_learnt_since_the_last_merge_is_discarded(replicas: Replicas) -> None:
    trainer = await start(replicas, "average")
    async with replicas.beating():
        await train(replicas, *"ab")
    await stop(trainer)
    trainer = await start(replicas, "average", merge_every=100, checkpoint_idle_s=100.0)
    async with replicas.beating():
        await replicas.publish_all("cd")
        await replicas.news.until(lambda: {"c", "d"} <= set(replicas.ended))
        assert ["c" in contents for contents in replicas.contents()].count(True) == 2, "apart"

        assert await roll_back(replicas, 1) == RolledBack(nodes=(0, 1), num_discarded=3)
        await until_all_hold(replicas, "a")
    await stop(trainer)
    assert replicas.discarded() == {"b", "c", "d"}


@pytest.mark.parametrize(
    ("merge", "turn"),
    [("average", "merge"), ("average", "shard"), ("average", "restore"), ("allreduce", "gradients")],
)
async def test_in_the_middle_of_what_they_do_together(replicas: Replicas, merge: str, turn: str) -> None:
    """Asked for at that turn of node 1; batches that nobody has applied by then are trained afterwards."""
    trainer = await start(replicas, merge)
    async with replicas.beating():
        await train(replicas, *"ab")
        turns: list[str] = []

        def happened(what: str) -> None:
            turns.append(what)
            replicas.news.tell()

        for node in replicas.nodes:
            node.happened = happened
        if turn == "restore":
            replicas.nodes[1].restart(0)
        await replicas.publish_all("cdef")
        await replicas.news.until(lambda: turn in turns)

        await roll_back(replicas, 1)

        await train(replicas, "g")
        await replicas.news.until(lambda: len(set(replicas.acked)) == 7)
        expected = set("abcdefg") - replicas.discarded()
        assert_all_hold(replicas, "".join(expected))
    await stop(trainer)

    assert "b" in replicas.discarded()
    assert "a" in expected


@pytest.mark.parametrize("place", ["intend", "complete"])
@pytest.mark.parametrize("runs_first", [False, True])
async def test_a_trainer_that_dies_meanwhile_leaves_all_back_or_none(
    replicas: Replicas, place: str, runs_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = await start(replicas, "average")
    async with replicas.beating():
        await train(replicas, *"abc")
        die_at(place, monkeypatch, runs_first=runs_first)
        with pytest.raises(Exception, match="no answer within"):
            await roll_back(replicas, 1, timeout_s=0.2)
        await replicas.news.until(trainer.done)
        assert isinstance(trainer.exception(), ExceptionGroup)
        monkeypatch.undo()

        trainer = await start(replicas, "average")
        await train(replicas, "d")
        is_decided = (place, runs_first) != ("intend", False)
        assert_all_hold(replicas, "ad" if is_decided else "abcd")
    await stop(trainer)


async def test_a_checkpoint_that_another_node_has_written_is_one_of_all(replicas: Replicas) -> None:
    """Node 1 writes version 1 while node 0 is away, and node 0 the versions after it."""
    (first, second), replicas.nodes = replicas.nodes, replicas.nodes[1:]
    trainer = await start(replicas, "average")
    async with replicas.beating():
        await train(replicas, "a")
        replicas.nodes = [first, second]
        await replicas.news.until(lambda: first.restores != [])
        await train(replicas, *"bc")
        writers = [(each.node, each.version) for each in await listed(replicas) if each.version]
        assert writers == [(0, 3), (0, 2), (1, 1)]

        assert await roll_back(replicas, 1) == RolledBack(nodes=(0, 1), num_discarded=2)
        await until_all_hold(replicas, "a")
        assert [(each.node, each.version) for each in await listed(replicas) if each.version] == [(1, 1)]
        await train(replicas, "d")
        assert_all_hold(replicas, "ad")
    await stop(trainer)


async def test_a_node_that_was_away_comes_back_to_where_the_others_are(replicas: Replicas) -> None:
    """It has written what they have gone back from."""
    (first, second), replicas.nodes = replicas.nodes, replicas.nodes[1:]
    trainer = await start(replicas, "average")
    async with replicas.beating():
        await train(replicas, *"ab")
        await stop(trainer)
        replicas.nodes = [first]
        trainer = await start(replicas, "average")
        await replicas.news.until(lambda: first.restores != [])

        assert await roll_back(replicas, 1) == RolledBack(nodes=(0,), num_discarded=1)
        second.restart(0)
        replicas.nodes = [first, second]
        await train(replicas, "c")
        await until_all_hold(replicas, "ac")
    await stop(trainer)


async def test_stages_are_told_a_version_from_the_one_that_had_its_number_before(replicas: Replicas) -> None:
    trainer = await start(replicas, "average")
    async with replicas.beating():
        await train(replicas, *"ab")
        before = await restored(replicas)
        await roll_back(replicas, 1)
        await train(replicas, "c")
        after = await restored(replicas)
    await stop(trainer)
    assert (before.version, before.checkpoint) == (after.version, after.checkpoint)
    assert before.digest != after.digest


async def restored(replicas: Replicas) -> SavedWeights:
    """What a stage that is restarted gets."""
    node = replicas.nodes[1]
    node.restores.clear()
    node.restart(0)
    await replicas.news.until(lambda: len(node.restores) == len(node.stages))
    return node.restores[-1].weights


async def test_a_full_disk_leaves_all_as_they_were(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = await start(replicas, "average")
    async with replicas.beating():
        await train(replicas, *"ab")
        fill_disk(monkeypatch)
        with pytest.raises(RefusedError, match="nothing was rolled back: no space left"):
            await roll_back(replicas, 1)
        await train(replicas, "c")
        assert_all_hold(replicas, "abc")
    await stop(trainer)


async def test_one_node_alone_and_versions_that_do_not_exist_are_refused(replicas: Replicas) -> None:
    trainer = await start(replicas, "average")
    async with replicas.beating():
        await train(replicas, *"ab")
        with pytest.raises(RefusedError, match="node 0 shares its weights") as refusal:
            await roll_back(replicas, 1, node=0)
        assert refusal.value.code == 409
        with pytest.raises(RefusedError, match="node 0, node 1: no durable version 7; there are: 2, 1"):
            await roll_back(replicas, 7)
        assert_all_hold(replicas, "ab")
    await stop(trainer)
