"""Requests follow the beginnings that nodes have computed, and forecasts know what is left. Virtual time."""

import asyncio

import pytest

from lemix.simulation.cluster import SimulationOptions, devices_of, running_cluster
from lemix.simulation.loop import run_virtual
from services.gateway.cluster_client import ClusterClient
from services.gateway.sent_sequence import SequenceSpec
from shared.lifecycle import World
from shared.messages.cluster import StatusRequest
from shared.messages.inference import Sampling
from shared.subjects import HEARTBEAT_S, STATUS
from tests.support.simulation import answer

SHARED = tuple(range(1, 1 + 480))


async def ttft_s(world: World, gateway: ClusterClient, prompt: tuple[int, ...]) -> tuple[float, int]:
    """Time to the first token of a prompt, and its node."""
    began_s = world.clock.now_s()
    (arrival,) = await answer(gateway.submit([SequenceSpec(prompt=prompt, sampling=Sampling(max_tokens=1))]))
    await asyncio.sleep(2 * HEARTBEAT_S)  # virtual: the stages report
    return arrival.at_s - began_s, arrival.node


def test_a_prompt_that_begins_like_an_earlier_one_goes_there_and_its_forecast_knows() -> None:
    options = SimulationOptions(nodes=2, profile="llama2-7b@a100", policy="lemix")

    async def case() -> None:
        async with running_cluster(options, devices=devices_of(options)) as cluster:
            world = cluster.world
            gateway = ClusterClient(
                bus=world.bus,
                clock=world.clock,
                ids=world.ids,
                telemetry=world.telemetry,
                request_timeout_s=60.0,
            )
            async with gateway.running():
                first_s, node = await ttft_s(world, gateway, (*SHARED, 991, 992))
                again_s, again_node = await ttft_s(world, gateway, (*SHARED, 993, 994))
                assert again_node == node
                assert again_s < 0.5 * first_s
                status = await world.bus.request(STATUS.at(), StatusRequest(), timeout_s=5)
                assert status.response_error.count == 2
                assert status.response_error.mean == pytest.approx(0.0, abs=0.01)

    run_virtual(case())
