"""Nodes whose weights become one, in virtual time: every batch is applied, and all end at one version."""

import asyncio

import pytest

from lemix.simulation.loop import run_virtual
from shared.bus.base import Incoming
from shared.messages.cluster import Heartbeat
from shared.subjects import HEARTBEAT
from tests.support.simulation import Training, simple_cluster

NUM_BATCHES = 8


class Versions:
    """What the stages say that they hold."""

    def __init__(self) -> None:
        self.by_stage: dict[tuple[int, int], int] = {}
        self._heard = asyncio.Condition()

    async def on_heartbeat(self, incoming: Incoming[Heartbeat]) -> None:
        beat = incoming.message
        async with self._heard:
            self.by_stage[beat.node, beat.stage] = beat.weights_version
            self._heard.notify_all()

    async def until_all_are(self, version: int) -> None:
        async with asyncio.timeout(600.0), self._heard:
            await self._heard.wait_for(lambda: set(self.by_stage.values()) == {version})


@pytest.mark.parametrize("merge", ["average", "outer", "allreduce"])
def test_all_nodes_end_at_one_version_that_holds_every_batch(merge: str) -> None:
    async def main() -> None:
        settings = {"merge": merge, "merge_every": 2, "checkpoint_idle_s": 1.0}
        async with simple_cluster(3, 2, schedule="1f1b", trainer_settings=settings) as (cluster, _):
            versions, training = Versions(), Training(cluster.world)
            await cluster.world.bus.subscribe(HEARTBEAT.at(), versions.on_heartbeat)
            await training.listen()
            for number in range(NUM_BATCHES):
                await training.publish(f"b{number}", 3, 5, 2, 6)
            await training.applied(*(f"b{number}" for number in range(NUM_BATCHES)))
            await versions.until_all_are(NUM_BATCHES)
            assert len(versions.by_stage) == 6

    run_virtual(main())
