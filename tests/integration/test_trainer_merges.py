"""Nodes whose weights become one, with nodes played by a script: each batch is in the final weights once."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared import checkpoints
from tests.integration.test_trainer_service import Cluster, stop

NUM_NODES = 2
BEAT_S = 0.01


class Replicas(Cluster):
    """Nodes that share their weights: the newest checkpoint of any is that of all."""

    def durable(self) -> list[str]:
        folder = self.folder / "checkpoints"
        found = [latest for node in range(NUM_NODES) if (latest := checkpoints.latest(folder, node))]
        newest = max(found, key=lambda checkpoint: checkpoint.manifest.version, default=None)
        return list(newest.manifest.recent_batch_ids) if newest else []

    def contents(self) -> list[list[str]]:
        """Batches in the weights of each stage of each node."""
        return [stage.contents for node in self.nodes for stage in node.stages]

    @asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """Stages go on telling that they are alive."""

        async def beat() -> None:
            while True:
                await self.beat()
                await asyncio.sleep(BEAT_S)

        async with asyncio.TaskGroup() as group:
            beats = group.create_task(beat())
            yield
            beats.cancel()

    async def publish_all(self, batch_ids: str) -> None:
        for batch_id in batch_ids:
            await self.publish(batch_id)


@pytest.fixture
async def replicas(tmp_path: Path) -> Replicas:
    cluster = Replicas(tmp_path)
    await cluster.start(NUM_NODES)
    return cluster


def assert_each_once(found: list[str], expected: str) -> None:
    assert Counter(found) == Counter(expected)


@pytest.mark.parametrize("merge", ["average", "outer", "allreduce"])
async def test_all_nodes_end_with_the_same_weights_which_hold_each_batch_once(
    replicas: Replicas, merge: str
) -> None:
    await replicas.publish_all("abcdefgh")
    trainer = await replicas.trainer(merge=merge, merge_every=2, schedule="1f1b")
    await replicas.until_durable(8)
    await replicas.news.until(lambda: len(replicas.acked) == 8)
    await stop(trainer)

    for contents in replicas.contents():
        assert_each_once(contents, "abcdefgh")
    assert_each_once(replicas.durable(), "abcdefgh")
    assert {bool(message.outer) for node in replicas.nodes for message in node.merges} <= {merge == "outer"}


async def test_data_parallel_nodes_step_on_the_mean_of_their_gradients(tmp_path: Path) -> None:
    cluster = Replicas(tmp_path)
    await cluster.start(NUM_NODES, num_stages=1)
    await cluster.publish_all("abcd")
    trainer = await cluster.trainer(schedule="dp")
    await cluster.until_durable(4)
    await stop(trainer)

    for contents in cluster.contents():
        assert_each_once(contents, "abcd")


@pytest.mark.parametrize(
    ("merge", "turn", "node", "occasion"),
    [
        ("average", "merge", 1, 3),
        ("average", "gradients", 1, 3),
        ("average", "step", 1, 3),
        ("average", "shard", 0, 3),  # it writes for all
        ("average", "restore", 1, 1),
        ("allreduce", "gradients", 1, 3),
        ("allreduce", "step", 1, 3),
        ("allreduce", "shard", 0, 1),
        ("allreduce", "restore", 1, 1),
    ],
)
async def test_a_node_that_dies_at_any_turn_costs_no_batch(
    replicas: Replicas, merge: str, turn: str, node: int, occasion: int
) -> None:
    await replicas.publish_all("abcdefgh")
    turns: list[str] = []

    def die(happened: str) -> None:
        turns.append(happened)
        if happened == turn and turns.count(turn) == occasion:
            replicas.nodes[node].restart(1)
        replicas.news.tell()

    replicas.nodes[node].happened = die
    trainer = await replicas.trainer(merge=merge, merge_every=1, schedule="1f1b")
    async with replicas.beating():
        await replicas.until_durable(8)
    await stop(trainer)

    assert turns.count(turn) >= occasion, "nobody has died"
    assert_each_once(replicas.durable(), "abcdefgh")


@pytest.mark.parametrize("merge", ["average", "allreduce"])
async def test_a_new_trainer_goes_on_from_the_newest_checkpoint_of_any_node(
    replicas: Replicas, merge: str
) -> None:
    await replicas.publish_all("abcd")
    trainer = await replicas.trainer(merge=merge, merge_every=1, schedule="1f1b")
    await replicas.until_durable(4)
    await stop(trainer)
    for node in replicas.nodes:
        node.restart(0)
        node.restart(1)

    trainer = await replicas.trainer(merge=merge, merge_every=1, schedule="1f1b")
    await replicas.publish_all("efgh")
    await replicas.until_durable(8)
    await stop(trainer)

    assert_each_once(replicas.durable(), "abcdefgh")
    for contents in replicas.contents():
        assert_each_once(contents, "abcdefgh")
