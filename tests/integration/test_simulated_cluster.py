"""The real services on simulated devices, in virtual time."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest

from lemix.simulation.cluster import SimulatedCluster
from lemix.simulation.faults import Faults
from lemix.simulation.loop import run_virtual
from services.gateway.cluster_client import ClusterClient
from shared.bus.base import Incoming
from shared.errors import ConfigurationError, LemixError, RefusedError
from shared.lifecycle import World
from shared.messages.training import MicrobatchEntered, StageReport
from shared.subjects import REPORT
from tests.support.simulation import (
    HOP_S,
    ITERATION_S,
    ROW_S,
    STEP_S,
    Training,
    answer,
    ask,
    simple_cluster,
)

Case = Callable[[SimulatedCluster, ClusterClient], Awaitable[None]]


def on_cluster(case: Case, nodes: int, stages: int, **options: object) -> None:
    async def main() -> None:
        async with simple_cluster(nodes, stages, **options) as (cluster, gateway):
            await case(cluster, gateway)

    run_virtual(main())


def test_a_request_takes_exactly_its_hops_and_iterations() -> None:
    async def case(cluster: SimulatedCluster, gateway: ClusterClient) -> None:
        begun_s = cluster.world.clock.now_s()
        first, second = await answer(ask(gateway, prompt_length=4, max_tokens=2))
        # Gateway to scheduler to stage 0 to 1 to 2, and back to the gateway; four rows on each stage.
        prefill_s = 5 * HOP_S + 3 * (ITERATION_S + 4 * ROW_S)
        assert first.at_s - begun_s == pytest.approx(prefill_s, abs=1e-9)
        # Back to stage 0, through the stages with one row, and to the gateway.
        decode_s = 3 * HOP_S + 3 * (ITERATION_S + ROW_S)
        assert second.at_s - first.at_s == pytest.approx(decode_s, abs=1e-9)

    on_cluster(case, nodes=1, stages=3)


def test_a_service_knows_that_its_device_is_done_a_hand_over_later() -> None:
    async def case(cluster: SimulatedCluster, gateway: ClusterClient) -> None:
        begun_s = cluster.world.clock.now_s()
        [token] = await answer(ask(gateway, prompt_length=4, max_tokens=1))
        prefill_s = 5 * HOP_S + 3 * (ITERATION_S + 4 * ROW_S + 0.03125)
        assert token.at_s - begun_s == pytest.approx(prefill_s, abs=1e-9)

    on_cluster(case, nodes=1, stages=3, handover_s=0.03125)


def test_a_batch_takes_exactly_its_forwards_backwards_and_step() -> None:
    async def case(cluster: SimulatedCluster, gateway: ClusterClient) -> None:
        clock, begun_s = cluster.world.clock, cluster.world.clock.now_s()
        training = Training(cluster.world)
        await training.listen()
        await training.publish("b", 4)
        await training.applied("b")
        # Trainer to scheduler and back, to stage 0 to 1 to 0, the step to 1 and its end to 0, and the report.
        hops_s = 8 * HOP_S
        compute_s = 2 * (2 + 4) * ROW_S * 4
        assert clock.now_s() - begun_s == pytest.approx(hops_s + compute_s + STEP_S, abs=1e-9)
        assert training.steps == [("b", 0)]

    on_cluster(case, nodes=1, stages=2)


def test_every_request_and_every_batch_of_a_busy_cluster_is_done() -> None:
    async def case(cluster: SimulatedCluster, gateway: ClusterClient) -> None:
        training = Training(cluster.world)
        await training.listen()
        batches = [f"b{number}" for number in range(8)]
        for batch_id in batches:
            await training.publish(batch_id, 3, 5, 2, 6)
        sessions = [ask(gateway, prompt_length=5, max_tokens=4) for _ in range(10)]
        answers = await asyncio.gather(*map(answer, sessions))
        assert [len(arrivals) for arrivals in answers] == [4] * 10
        await training.applied(*batches)
        assert sorted(training.steps) == sorted(set(training.steps)), "each was stepped on once"
        assert {node for _, node in training.steps} == {0, 1}

    on_cluster(case, nodes=2, stages=2)


def test_a_crash_of_the_only_node_fails_the_requests_there_and_its_batches_run_again() -> None:
    async def case(cluster: SimulatedCluster, gateway: ClusterClient) -> None:
        training = Training(cluster.world)
        await training.listen()
        await training.publish("b", 8, 8, 8, 8)
        session = ask(gateway, prompt_length=5, max_tokens=50)
        await session.next()
        cluster.nodes.crash(0, 1)
        await asyncio.sleep(1.0)
        cluster.nodes.start(0, 1)
        with pytest.raises(RefusedError, match=r"stage 1.*could not go on elsewhere: no node is ready"):
            await answer(session)
        session.close()
        await training.applied("b")
        assert len(await answer(ask(gateway, prompt_length=5, max_tokens=3))) == 3

    on_cluster(case, nodes=1, stages=2)


def test_messages_that_come_late_and_twice_change_no_answer() -> None:
    async def case(cluster: SimulatedCluster, gateway: ClusterClient) -> None:
        sessions = [ask(gateway, prompt_length=5, max_tokens=6) for _ in range(10)]
        for arrivals in await asyncio.gather(*map(answer, sessions)):
            indices = [arrival.result.index for arrival in arrivals]
            assert sorted(set(indices)) == list(range(6))

    faults = Faults(doubled=0.1, late=0.3)
    on_cluster(case, nodes=2, stages=3, faults=faults)


def test_the_error_of_one_service_ends_the_simulation() -> None:
    class BrokenDiskError(LemixError):
        pass

    async def fail(incoming: Incoming[StageReport]) -> None:
        raise BrokenDiskError("in a handler")

    async def case(cluster: SimulatedCluster, gateway: ClusterClient) -> None:
        async def serve(world: World) -> None:
            await world.bus.subscribe(REPORT.at(), fail)
            await asyncio.sleep(1000)

        cluster.services.start(serve)
        report = StageReport(node=0, stage=0, fence=1, event=MicrobatchEntered(batch_id="b", index=0))
        await asyncio.sleep(1.0)
        await cluster.world.bus.publish(REPORT.at(), report)
        await asyncio.sleep(1000)

    with pytest.raises(BrokenDiskError, match="in a handler"):
        on_cluster(case, nodes=1, stages=1)


def test_a_wrong_option_is_named() -> None:
    async def case(cluster: SimulatedCluster, gateway: ClusterClient) -> None:
        raise AssertionError("it must not begin")

    with pytest.raises(ConfigurationError, match="best_of_all"):
        on_cluster(case, nodes=1, stages=1, policy="best_of_all")


@pytest.mark.parametrize("policy", ["random", "lemix"])
def test_a_seed_decides_every_byte_whatever_the_process(policy: str) -> None:
    def digest(seed: int, hash_seed: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.simulation", policy, str(seed)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        return done.stdout.strip()

    first = digest(1, "0")
    assert len(first) == 64
    assert digest(1, "4242") == first
    assert digest(2, "0") != first
