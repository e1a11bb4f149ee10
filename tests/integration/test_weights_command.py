"""`lemix weights` and `lemix lineage` against a running trainer, over NATS."""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from rich.console import Console

from lemix.lineage_command import fetch_lineage
from lemix.nats_server import NatsServer
from lemix.run_choice import Target
from lemix.weights_command import run_list, run_rollback
from shared.bus.base import Incoming
from shared.bus.nats import NatsBus
from shared.errors import NoResponderError, RefusedError
from shared.messages.lineage import (
    LearntBatch,
    LineageEntry,
    LineageEntryRequest,
    LineageRequest,
    VersionLineage,
)
from shared.messages.weights import (
    DurableVersion,
    DurableVersions,
    DurableVersionsRequest,
    RollBackWeights,
    RolledBack,
)
from shared.subjects import DURABLE_VERSIONS, LINEAGE, LINEAGE_ENTRY, ROLLBACK


def entry(version: int, *, older: int | None) -> LineageEntry:
    """The version has learnt one batch beyond the one before."""
    learnt = LearntBatch(id=f"b{version}", sequence=version, producer="", sha256="")
    return LineageEntry(version=version, num_before=version - 1, older=older, batches=(learnt,))


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

    async def show_lineage(self, incoming: Incoming[LineageRequest]) -> VersionLineage:
        if incoming.message.version != 4:
            raise RefusedError("there are: 8, 4", code=404)
        return VersionLineage(node=1, newest=entry(4, older=90))

    async def show_lineage_entry(self, incoming: Incoming[LineageEntryRequest]) -> LineageEntry:
        return {90: entry(3, older=40), 40: entry(2, older=None)}[incoming.message.place]

    async def roll_back(self, incoming: Incoming[RollBackWeights]) -> RolledBack:
        self.asked.append(incoming.message)
        if incoming.message.version != 4:
            raise RefusedError("there are: 8, 4", code=404)
        return RolledBack(nodes=(0, 1), num_discarded=3)


@asynccontextmanager
async def running_trainer(url: str) -> AsyncIterator[FakeTrainer]:
    trainer, bus = FakeTrainer(), await NatsBus.connect(url, name="trainer")
    await bus.respond(DURABLE_VERSIONS.at(), trainer.list_versions)
    await bus.respond(LINEAGE.at(), trainer.show_lineage)
    await bus.respond(LINEAGE_ENTRY.at(), trainer.show_lineage_entry)
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


async def test_a_running_trainer_tells_what_a_version_has_learnt_entry_by_entry(tmp_path: Path) -> None:
    async with NatsServer(tmp_path / "nats") as server:
        target = Target(server.url, "run one")
        with pytest.raises(NoResponderError, match="no trainer is connected"):
            await fetch_lineage(target, 4, None)
        async with running_trainer(server.url):
            with pytest.raises(RefusedError, match="there are: 8, 4"):
                await fetch_lineage(target, 5, None)
            found = await fetch_lineage(target, 4, None)
    assert (found.node, found.version, found.num_unknown) == (1, 4, 1)
    assert [batch.id for batch in found.batches] == ["b2", "b3", "b4"]
