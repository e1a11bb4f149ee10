"""Real processes of every kind are killed while a node trains and answers: the weights show nothing of it."""

import asyncio
import os
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from lemix.bus import open_bus
from lemix.client import ApiClient, ApiError, served_model
from lemix.launcher import LocalCluster
from lemix.simulation.loop import run_virtual
from lemix.topology import ClusterOptions
from shared import checkpoints
from shared.bus.permissions import Role
from shared.checkpoints import Checkpoint
from shared.settings import EMBEDDED_MODEL
from shared.subjects import BATCHES, REPORT
from tests.chaos.test_killed_trainer import Steps, durable_version
from tests.support.mortal_cluster import MortalCluster, bodies_of
from tests.support.processes import is_alive
from tests.support.training import random_batches
from tests.support.waiting import until

SEED = 4
RUN = random_batches(30, 2)
CHECKPOINT_EVERY = 5
MAX_TOKENS = 8
DEADLINE_S = 600.0
"""Far more than it takes: the machine may be busy."""
SERVICES = ("gateway", "scheduler", "trainer", "node-0-stage-0", "node-0-stage-1")


def undisturbed(run_dir: Path) -> Checkpoint:
    """The same run in one process, without a death."""
    run_dir.mkdir()
    cluster = MortalCluster(
        model=Path(EMBEDDED_MODEL),
        run_dir=run_dir,
        seed=0,
        trainer_settings={"schedule": "1f1b", "microbatches": 2, "checkpoint_every": CHECKPOINT_EVERY},
        stage_settings={},
    )
    return run_virtual(cluster.train(RUN))


def pid_of(cluster: LocalCluster, victim: str) -> int:
    if victim != "nats":
        return cluster.pids[victim]
    (ports,) = (cluster.run_dir / "nats").glob("nats-server_*.ports")
    return int(ports.stem.removeprefix("nats-server_"))


async def kill(cluster: LocalCluster, victim: str) -> None:
    pid = pid_of(cluster, victim)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not is_alive(pid))


@dataclass
class Requests:
    """Asks one after the other, for as long as it is let."""

    num_whole: int = 0
    errors: list[str] = field(default_factory=list)

    async def ask_on(self, api: ApiClient) -> None:
        while True:
            try:
                await self.ask(api)
            except ApiError as error:
                assert str(error), "an error says what is wrong"
                self.errors.append(str(error))
                await asyncio.sleep(0.2)

    async def ask(self, api: ApiClient) -> None:
        answer = await api.complete("Return the", max_tokens=MAX_TOKENS)
        assert answer.finish_reason == "stop" or answer.completion_tokens == MAX_TOKENS
        self.num_whole += 1


async def train_and_kill(runs_dir: Path) -> tuple[Checkpoint, Requests]:
    rng = random.Random(SEED)
    victims = rng.sample((*SERVICES, "nats"), k=len(SERVICES) + 1)
    options = ClusterOptions(
        runs_dir=runs_dir,
        nodes=1,
        stages=2,
        stages_per_worker=1,
        start_timeout_s=DEADLINE_S,
        extra_env={
            "LEMIX_SCHEDULE": "1f1b",
            "LEMIX_MICROBATCHES": "2",
            "LEMIX_CHECKPOINT_EVERY": str(CHECKPOINT_EVERY),
            "LEMIX_CHECKPOINT_IDLE_S": "0.5",
            "LEMIX_REQUEST_TIMEOUT_S": "5",
            "LEMIX_NATS_URL": "",
        },
    )
    steps, requests, events = Steps(), Requests(), list[str]()
    async with (
        LocalCluster(options, on_event=events.append) as cluster,
        open_bus(cluster.nats_url, cluster.nats_users, Role.INGEST) as bus,
        open_bus(cluster.nats_url, cluster.nats_users, Role.TRAINER) as trainer,
        asyncio.timeout(DEADLINE_S),
    ):
        await trainer.subscribe(REPORT.at(), steps.on_report)
        for body in bodies_of(RUN):
            await bus.publish_durable(BATCHES, body)
        model = await served_model(cluster.api_url)
        async with ApiClient(cluster.api_url, model=model, timeout_s=10.0) as api:
            asking = asyncio.create_task(requests.ask_on(api))
            for number, victim in enumerate(victims):
                await steps.reach(number * 4 + rng.randint(2, 4), after_fence=0)
                await kill(cluster, victim)
            await until(lambda: durable_version(cluster) == len(RUN), timeout_s=DEADLINE_S)
            asking.cancel()
            await asyncio.wait([asking])
            assert asking.cancelled()
            await until_answered(requests, api)
        found = checkpoints.latest(cluster.run_dir / "checkpoints", 0)
        trainer_log = (cluster.run_dir / "logs" / "trainer.log").read_text()
    assert found is not None
    assert sorted(event.split()[0] for event in events) == sorted(victims), "each died once, by our hand"
    assert "no report for" not in trainer_log, "what was lost with a connection was noticed at once"
    return found, requests


async def until_answered(requests: Requests, api: ApiClient) -> None:
    """All is well again: an answer comes."""
    while True:
        try:
            return await requests.ask(api)
        except ApiError:
            await asyncio.sleep(0.2)


def test_whatever_is_killed_the_weights_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "undisturbed")

    got, requests = asyncio.run(train_and_kill(tmp_path))

    assert got.manifest.recent_batch_ids == expected.manifest.recent_batch_ids
    assert len(got.manifest.recent_batch_ids) == len(RUN)
    assert requests.num_whole > 0
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        tensors, others = load_file(got.folder / name), load_file(expected.folder / name)
        assert [key for key in others if not torch.equal(tensors[key], others[key])] == []
