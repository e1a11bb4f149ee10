"""A node whose stages run on two hosts: separate processes with a network and shared memory of their own."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from lemix.nats_server import NatsServer
from shared import subjects
from shared.bus.base import Incoming
from shared.bus.nats import NatsBus
from shared.messages.inference import IterationForward
from tests.integration.test_pipeline_training import Feeder, train_in_one_process, weights_of
from tests.support.hosts import TwoHosts, two_hosts
from tests.support.models import save_tiny_model
from tests.support.node import Node
from tests.support.reference import greedy_reference
from tests.support.training import ADAMW, assert_equal, random_batches

PROMPT = [3, 14, 15, 92, 65, 35] * 60
"""Its activations are too large for a message."""
NUM_STAGES, NUM_BATCHES, MAX_TOKENS = 2, 3, 12
START_DEADLINE_S = 240.0
"""Each process imports for seconds, and for a minute where others use the cores."""


@asynccontextmanager
async def node_over(hosts: TwoHosts, server: NatsServer, folder: Path) -> AsyncIterator[Node]:
    """Stage 0 runs here and stage 1 there; ready."""
    async with AsyncExitStack() as stack:
        bus = await NatsBus.connect(server.url, name="test")
        stack.push_async_callback(bus.close)
        node = Node(bus, NUM_STAGES)
        await node.subscribe()
        for stage, address in enumerate((hosts.here, hosts.there)):
            environment = {
                "LEMIX_NATS_URL": server.url,
                "LEMIX_NODE": "0",
                "LEMIX_STAGE": str(stage),
                "LEMIX_NUM_STAGES": str(NUM_STAGES),
                "LEMIX_MODEL": str(folder / "model"),
                "LEMIX_RUN_DIR": str(folder),
                "LEMIX_COLLECTIVE_HOST": address,
                **{f"LEMIX_{name.upper()}": str(value) for name, value in ADAMW.items()},
            }
            log = folder / f"stage-{stage}.log"
            await stack.enter_async_context(
                hosts.service("stage_worker", environment, log, is_there=stage == 1)
            )
        await node.ready(timeout_s=START_DEADLINE_S)
        yield node


async def test_it_answers_and_trains_as_one_process_and_outlives_a_broken_connection(tmp_path: Path) -> None:
    model = save_tiny_model("llama_tied", tmp_path / "model")
    expected, _ = greedy_reference(model, PROMPT, MAX_TOKENS)
    batches, carriers = random_batches(NUM_BATCHES, 2), set[str]()

    async def note_carrier(incoming: Incoming[IterationForward]) -> None:
        carriers.add(incoming.message.hidden.carrier)

    async with (
        two_hosts() as hosts,
        NatsServer(tmp_path / "nats", host=hosts.here) as server,
        node_over(hosts, server, tmp_path) as node,
    ):
        await node.bus.subscribe(subjects.ITERATION.at(node=0, stage=1), note_carrier)
        assert (await node.complete(PROMPT, max_tokens=MAX_TOKENS)).token_ids == expected
        await node.restore(fence=1)
        feeder = Feeder(node)
        await feeder.sync(batches)
        weights = await weights_of(node, NUM_BATCHES, tmp_path / "checkpoints" / "end")

        instances = {stage: beat.instance for stage, beat in node.heartbeats.items()}
        lost = await node.start(PROMPT, max_tokens=3000)
        await lost.first_token()
        await hosts.cut(spared_port=server.port)
        await lost.end()
        assert lost.failure is not None
        assert (lost.failure.code, lost.finish) == (503, None)
        await node.restore(fence=2)
        assert (await node.complete(PROMPT, max_tokens=MAX_TOKENS)).token_ids == expected
        assert {stage: beat.instance for stage, beat in node.heartbeats.items()} == instances
    losses = train_in_one_process(model, batches)
    assert list(feeder.losses.values()) == pytest.approx(losses, abs=1e-5)
    assert_equal(weights, model.state_dict())
    assert carriers == {"collective"}
