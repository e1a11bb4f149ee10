"""`lemix weights` against a running trainer, over NATS: listing its versions, and going back to one."""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from rich.console import Console

from lemix.nats_server import NatsServer
from lemix.run_choice import Target
from lemix.weights_command import run_list, run_rollback
from shared.bus.base import Incoming
from shared.bus.nats import NatsBus
from shared.errors import NoResponderError, RefusedError
from shared.messages.weights import (
    DurableVersion,
    DurableVersions,
    DurableVersionsRequest,
    RollBackWeights,
    RolledBack,
)
from shared.subjects import DURABLE_VERSIONS, ROLLBACK


class FakeTrainer:
    """Two nodes, each with the versions 8 and 4."""

    def __init__(self) -> None:
        self.asked: list[RollBackWeights] = []

    async def list_versions(self, incoming: Incoming[DurableVersionsRequest]) -> DurableVersions:
        found = tuple(
            DurableVersion(
                node=node,
                version=version,
                created_wall_s=0.0,
                newest_batch_id=f"b{version}",
                held_out_loss=None,
                may_serve=True,
                num_ahead=None,
            )
            for node in (0, 1)
            for version in (8, 4)
        )
        return DurableVersions(versions=found)

    async def roll_back(self, incoming: Incoming[RollBackWeights]) -> RolledBack:
        self.asked.append(incoming.message)
        if incoming.message.version != 4:
            raise RefusedError("there are: 8, 4", code=404)
        return RolledBack(nodes=(0, 1), num_discarded=3)


@asynccontextmanager
async def running_trainer(url: str) -> AsyncIterator[FakeTrainer]:
    trainer, bus = FakeTrainer(), await NatsBus.connect(url, name="trainer")
    await bus.respond(DURABLE_VERSIONS.at(), trainer.list_versions)
    await bus.respond(ROLLBACK.at(), trainer.roll_back)
    try:
        yield trainer
    finally:
        await bus.close()


async def test_a_running_trainer_lists_its_versions_and_goes_back_to_one(tmp_path: Path) -> None:
    shown = Console(file=io.StringIO(), width=200)
    async with NatsServer(tmp_path / "nats") as server:
        target = Target(server.url, "run one")
        with pytest.raises(NoResponderError, match="no trainer is connected"):
            await run_rollback(4, None, target, shown)
        async with running_trainer(server.url) as trainer:
            await run_list(target, shown, 0.0)
            await run_rollback(4, None, target, shown)
            with pytest.raises(RefusedError, match="there are: 8, 4"):
                await run_rollback(5, 1, target, shown)
    assert isinstance(shown.file, io.StringIO)
    printed = shown.file.getvalue()
    rows = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:2] for row in rows] == [["0", "8"], ["0", "4"], ["1", "8"], ["1", "4"]]
    assert "run one, node 0, 1: back at version 4; 3 batches are discarded" in printed
    assert trainer.asked == [RollBackWeights(version=4), RollBackWeights(version=5, node=1)]
