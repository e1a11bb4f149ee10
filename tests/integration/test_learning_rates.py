"""Learning rates that stages are ordered to step with, over restarts, against numbers worked out by hand."""

import json
from collections import defaultdict
from collections.abc import Container
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from services.trainer.streams import TRAIN_STREAM
from shared.messages.training import StepOrder
from tests.integration.test_trainer_merges import Replicas
from tests.integration.test_trainer_service import EXAMPLES, Cluster, stop

SCHEDULE: dict[str, Any] = {
    "learning_rate": 1.0,
    "learning_rate_schedule": "linear",
    "warmup_batches": 2,
    "learning_rate_batches": 10,
}
RATES = [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375]
"""Of the first batches of a run."""


@pytest.fixture
async def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


async def publish(cluster: Cluster, batch_ids: str) -> None:
    for batch_id in batch_ids:
        await cluster.publish(batch_id)


def ordered(cluster: Cluster) -> set[tuple[str, float]]:
    """The batches that stages of any node were ordered to step on, each with every rate that it has had."""
    return {(order.batch_id, order.learning_rate) for node in cluster.nodes for order in node.orders}


def expected(batch_ids: str) -> set[tuple[str, float]]:
    return set(zip(batch_ids, RATES, strict=False))


async def test_a_schedule_goes_on_where_it_was_on_all_nodes(cluster: Cluster) -> None:
    await cluster.start(num_nodes=2)
    await publish(cluster, "abcde")
    trainer = await cluster.trainer(**SCHEDULE, checkpoint_every=2, checkpoint_idle_s=100.0)
    await cluster.news.until(lambda: len(cluster.ended) == 5 and len(cluster.durable()) == 4)
    await stop(trainer)
    await cluster.bus.purge_stream(TRAIN_STREAM.name, 4)

    trainer = await cluster.trainer(**SCHEDULE)
    await publish(cluster, "fgh")
    await cluster.until_durable(8)
    await stop(trainer)

    orders = [order for node in cluster.nodes for order in node.orders if order.batch_id == "e"]
    assert len(orders) == 2 * 2, "it was not durable: both stages of one node, and then of the other"
    assert ordered(cluster) == expected("abcdefgh")


async def test_a_run_that_begins_with_the_next_batch_has_its_own_warm_up(cluster: Cluster) -> None:
    await cluster.start()
    await publish(cluster, "xyz")
    trainer = await cluster.trainer(**SCHEDULE, train_from="next")
    await stop(trainer)
    for batch_ids in ("ab", "cd"):
        await publish(cluster, batch_ids)
        trainer = await cluster.trainer(**SCHEDULE, train_from="next")
        await cluster.news.until(lambda last=batch_ids[-1]: last in cluster.durable())
        await stop(trainer)

    assert ordered(cluster) == expected("abcd")


async def test_a_run_on_a_stream_that_was_emptied_has_its_own_warm_up(cluster: Cluster) -> None:
    await cluster.start()
    await publish(cluster, "xyza")
    await cluster.bus.purge_stream(TRAIN_STREAM.name, 3)
    stream = cluster.broker.streams[TRAIN_STREAM.name]
    for batch_id in "bc":
        last = await cluster.publish(batch_id)
        trainer = await cluster.trainer(**SCHEDULE, keep_checkpoints=1)
        await cluster.news.until(lambda last=last: stream.num_removed == last)
        await stop(trainer)

    assert ordered(cluster) == expected("abc")


async def test_nodes_that_step_together_do_so_with_the_mean_of_their_batches_rates(tmp_path: Path) -> None:
    cluster = Replicas(tmp_path)
    await cluster.start(num_nodes=2, num_stages=1)
    trainer = await cluster.trainer(schedule="dp", learning_rate=1.0)
    multipliers: dict[str, float] = {}
    by_version: dict[int, list[StepOrder]] = {}
    while not any(len(batches) == 2 for batches in batches_of(by_version, multipliers)):
        assert len(multipliers) < 200, "two nodes step on two batches"  # seldom not among the first ones
        for _ in range(8):
            batch_id = f"b{len(multipliers)}"
            multipliers[batch_id] = 0.5 + len(multipliers)
            body = {
                "id": batch_id,
                "examples": EXAMPLES,
                "learning_rate_multiplier": multipliers[batch_id],
            }
            await cluster.publish(batch_id, json.dumps(body).encode())
        await cluster.until_durable(len(multipliers))
        by_version = orders_by_version(cluster)
    await stop(trainer)

    for orders, batch_ids in zip(by_version.values(), batches_of(by_version, multipliers), strict=True):
        assert {order.learning_rate for order in orders} == {fmean(multipliers[each] for each in batch_ids)}


def orders_by_version(cluster: Replicas) -> dict[int, list[StepOrder]]:
    by_version: defaultdict[int, list[StepOrder]] = defaultdict(list)
    for node in cluster.nodes:
        for order in node.orders:
            by_version[order.version].append(order)
    return by_version


def batches_of(by_version: dict[int, list[StepOrder]], known: Container[str]) -> list[list[str]]:
    """The batches of each step; nodes without one step under another name."""
    return [[each.batch_id for each in orders if each.batch_id in known] for orders in by_version.values()]
