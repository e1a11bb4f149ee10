"""`lemix up --emulate`: the real services over NATS, on stages that only take their time."""

import json
from pathlib import Path

import pytest

from lemix.bus import open_bus
from lemix.client import ApiClient, served_model
from lemix.launcher import LocalCluster
from lemix.status import fetch_status, fetch_weights
from lemix.topology import ClusterOptions
from lemix.waiting import AppliedBatches, wait_nodes_ready
from shared.bus.permissions import Role
from shared.subjects import BATCHES

PROFILE = "gpt2-small@rtx6000ada"


async def test_a_completion_and_a_training_step_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LEMIX_NATS_URL", raising=False)
    options = ClusterOptions(name="run", runs_dir=tmp_path, nodes=1, stages=2, emulate=PROFILE)
    async with (
        LocalCluster(options) as cluster,
        open_bus(cluster.nats_url, cluster.nats_users, Role.INGEST) as bus,
    ):
        async with ApiClient(cluster.api_url, model=await served_model(cluster.api_url)) as api:
            completion = await api.complete("The function returns", max_tokens=8)
        await wait_nodes_ready(bus, 1)
        applied = await AppliedBatches.following(bus)
        batch = {"id": "one", "examples": [{"token_ids": [1, 2, 3, 4]}]}
        await bus.publish_durable(BATCHES, json.dumps(batch).encode())
        await applied.wait_for(["one"])
        (node,) = (await fetch_status(bus)).nodes
        (weights,) = (await fetch_weights(bus)).nodes
    assert (completion.completion_tokens, completion.finish_reason) == (8, "length")
    assert ([stage.device for stage in node.stages], weights.version) == ([PROFILE, PROFILE], 1)
