"""The trainer's process is killed where it hurts, as the kernel would: between a step and its checkpoint."""

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from lemix.bus import open_bus
from lemix.launcher import LocalCluster
from lemix.topology import ClusterOptions
from shared import checkpoints
from shared.bus.base import Bus, Incoming
from shared.bus.permissions import Role
from shared.messages.training import BatchStepped, StageReport
from shared.subjects import BATCHES, REPORT
from tests.support.processes import is_alive
from tests.support.waiting import until

NUM_BATCHES = 40
CHECKPOINT_EVERY = 8
LAST_STAGE = 1
IDS = [f"batch-{number}" for number in range(NUM_BATCHES)]
DEADLINE_S = 300.0
"""Far more than it takes: the machine may be busy."""


class Steps:
    """The optimizer steps of a node, as its first stage reports them."""

    def __init__(self) -> None:
        self.fence = 0
        self.version = 0
        self.lineage: list[str] = []
        """Batches in the stage's weights, in the order of their steps; a restore takes back the latest."""
        self._stepped = asyncio.Event()

    async def on_report(self, incoming: Incoming[StageReport]) -> None:
        report = incoming.message
        if isinstance(report.event, BatchStepped):
            self.fence, self.version = report.fence, report.event.version
            self.lineage[self.version - 1 :] = [report.event.batch_id]
            self._stepped.set()

    async def reach(self, version: int, *, after_fence: int) -> None:
        while self.version < version or self.fence <= after_fence:
            self._stepped.clear()
            await self._stepped.wait()


@asynccontextmanager
async def running_cluster(runs_dir: Path) -> AsyncIterator[LocalCluster]:
    options = ClusterOptions(
        runs_dir=runs_dir,
        nodes=1,
        stages=2,
        stages_per_worker=2,
        extra_env={
            "LEMIX_CHECKPOINT_EVERY": str(CHECKPOINT_EVERY),
            "LEMIX_CHECKPOINT_IDLE_S": "0.5",
            "LEMIX_NATS_URL": "",
        },
    )
    async with LocalCluster(options) as cluster:
        yield cluster


async def publish_all(bus: Bus) -> None:
    for batch_id in IDS:
        examples = [{"text": f"Sea area Northpoint, bulletin {batch_id}: part {part}."} for part in range(4)]
        await bus.publish_durable(BATCHES, json.dumps({"id": batch_id, "examples": examples}).encode())


def durable(cluster: LocalCluster) -> checkpoints.Manifest | None:
    found = checkpoints.latest(cluster.run_dir / "checkpoints", 0)
    return found.manifest if found else None


def durable_version(cluster: LocalCluster) -> int:
    manifest = durable(cluster)
    return manifest.version if manifest else 0


async def kill_trainer(cluster: LocalCluster) -> None:
    pid = cluster.pids["trainer"]
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not is_alive(pid))


async def test_each_batch_is_once_in_the_durable_weights_however_often_the_trainer_is_killed(
    tmp_path: Path,
) -> None:
    rng = random.Random(20)
    kill_at = [begin + rng.randint(2, CHECKPOINT_EVERY - 3) for begin in (0, CHECKPOINT_EVERY, 24)]
    steps, fence = Steps(), 0
    async with (
        running_cluster(tmp_path) as cluster,
        open_bus(cluster.nats_url, cluster.nats_users, Role.INGEST) as bus,
        open_bus(cluster.nats_url, cluster.nats_users, Role.TRAINER) as trainer,
    ):
        await trainer.subscribe(REPORT.at(), steps.on_report)
        async with asyncio.timeout(DEADLINE_S):
            await publish_all(bus)
            for version in kill_at:
                await steps.reach(version, after_fence=fence)
                await kill_trainer(cluster)
                fence = steps.fence
                assert durable_version(cluster) < version, "nothing was at stake"
            await until(lambda: durable_version(cluster) >= NUM_BATCHES, timeout_s=DEADLINE_S)
    manifest = durable(cluster)
    assert manifest is not None
    assert manifest.version == NUM_BATCHES
    assert sorted(manifest.recent_batch_ids) == sorted(IDS)
    assert sorted(steps.lineage) == sorted(IDS), "what the stages stepped on is what the manifest says"
