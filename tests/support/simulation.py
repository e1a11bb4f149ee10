"""Simulated clusters on devices so simple that a test can work out every time by hand.

`python -m tests.support.simulation POLICY SEED` runs a busy one and prints a digest of all its messages.
"""

import asyncio
import hashlib
import itertools
import json
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from lemix.simulation.cluster import SimulatedCluster, SimulationOptions, running_cluster
from lemix.simulation.devices import Devices
from lemix.simulation.faults import Faults
from lemix.simulation.loop import run_virtual
from lemix.simulation.sent_requests import prompt_of
from services.gateway.cluster_client import Arrival, ClusterClient, Session
from services.gateway.sent_sequence import SequenceSpec
from shared.bus.base import Incoming
from shared.bus.memory import Observer
from shared.errors import LemixError
from shared.lifecycle import World
from shared.messages.base import Message
from shared.messages.inference import Sampling
from shared.messages.training import BatchStepped, StageReport
from shared.profiles.times import Work
from shared.subjects import BATCHES, REPORT

ITERATION_S = 0.5
ROW_S = 0.125
"""More for each row; twice as much for a row's training forward, four times for its backward."""
STEP_S = 0.25
HOP_S = 0.0625


class SimpleTimes:
    """Binary fractions of a second: sums of them are exact."""

    def iteration_s(self, work: Work) -> float:
        return ITERATION_S + ROW_S * work.num_tokens

    def forward_s(self, work: Work) -> float:
        return 2 * ROW_S * work.num_tokens

    def backward_s(self, work: Work) -> float:
        return 4 * ROW_S * work.num_tokens

    def step_s(self) -> float:
        return STEP_S


@asynccontextmanager
async def simple_cluster(
    nodes: int, stages: int, *, observe: Observer | None = None, **options: Any
) -> AsyncIterator[tuple[SimulatedCluster, ClusterClient]]:
    """A ready cluster, and a gateway to ask it."""
    given = {"profile": "simple", "policy": "round_robin", "hop_s": HOP_S, **options}
    times = tuple(SimpleTimes() for _ in range(stages))
    devices = Devices(times=times, vocab_size=100, context_length=512, kv_tokens=4096)
    chosen = SimulationOptions(nodes=nodes, stages=stages, **given)
    async with running_cluster(chosen, devices=devices, observe=observe) as cluster:
        world = cluster.world
        gateway = ClusterClient(
            bus=world.bus,
            clock=world.clock,
            ids=world.ids,
            telemetry=world.telemetry,
            request_timeout_s=300.0,
        )
        async with gateway.running():
            yield cluster, gateway


_numbers = itertools.count()


def ask(gateway: ClusterClient, *, prompt_length: int, max_tokens: int) -> Session:
    prompt = prompt_of(next(_numbers), prompt_length)
    return gateway.submit([SequenceSpec(prompt=prompt, sampling=Sampling(max_tokens=max_tokens))])


async def answer(session: Session) -> list[Arrival]:
    """All that comes for a request of one sequence."""
    arrivals: list[Arrival] = []
    while not arrivals or arrivals[-1].result.finish is None:
        arrivals += await session.next()
    session.close()
    return arrivals


class Training:
    """Publishes batches and hears of their steps."""

    def __init__(self, world: World) -> None:
        self.steps: list[tuple[str, int]] = []
        """(batch, node) in the order of telling."""
        self._world = world
        self._stepped = asyncio.Condition()

    async def listen(self) -> None:
        await self._world.bus.subscribe(REPORT.at(), self._on_report)

    async def publish(self, batch_id: str, *lengths: int) -> None:
        examples = [{"token_ids": list(range(length))} for length in lengths]
        body = json.dumps({"id": batch_id, "examples": examples}).encode()
        await self._world.bus.publish_durable(BATCHES, body)

    async def applied(self, *batch_ids: str) -> None:
        """Wait until all stages of a node have stepped for these."""
        async with asyncio.timeout(600.0), self._stepped:
            await self._stepped.wait_for(lambda: set(batch_ids) <= self._done())

    def _done(self) -> set[str]:
        return {batch_id for batch_id, _ in self.steps}

    async def _on_report(self, incoming: Incoming[StageReport]) -> None:
        report = incoming.message
        if isinstance(report.event, BatchStepped):
            async with self._stepped:
                self.steps.append((report.event.batch_id, report.node))
                self._stepped.notify_all()


def digest(policy: str, seed: int) -> str:
    """The digest of every message of a run with load, faults and a crash: when, where to, and its bytes."""
    told = hashlib.sha256()

    def observe(subject: str, message: Message, now_s: float) -> None:
        told.update(f"{now_s!r} {subject} {type(message).__name__} ".encode() + message.pack())

    async def main() -> str:
        faults = Faults(late=0.2)
        async with simple_cluster(3, 3, observe=observe, policy=policy, seed=seed, faults=faults) as (
            cluster,
            gateway,
        ):
            await _load(cluster, gateway, random.Random(seed))
            return told.hexdigest()  # here: the order in which services are ended is nobody's business

    return run_virtual(main())


async def _load(cluster: SimulatedCluster, gateway: ClusterClient, rng: random.Random) -> None:
    training = Training(cluster.world)
    await training.listen()
    async with asyncio.TaskGroup() as group:
        for number in range(12):
            await asyncio.sleep(rng.uniform(0, 2))
            session = ask(gateway, prompt_length=rng.randrange(1, 20), max_tokens=rng.randrange(1, 6))
            group.create_task(_answered_or_failed(session))
            await training.publish(f"batch-{number}", *(rng.randrange(2, 9) for _ in range(4)))
            if number == 6:
                cluster.nodes.crash(1, 1)
                cluster.nodes.start(1, 1)
    await training.applied(*(f"batch-{number}" for number in range(12)))


async def _answered_or_failed(session: Session) -> None:
    try:
        await answer(session)
    except LemixError:
        session.close()


if __name__ == "__main__":
    sys.stdout.write(digest(sys.argv[1], int(sys.argv[2])) + "\n")
