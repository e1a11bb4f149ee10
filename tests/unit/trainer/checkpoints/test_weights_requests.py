"""Which nodes a rollback is asked of."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.trainer.checkpoints.rollbacks import RunAll
from services.trainer.checkpoints.weights_requests import WeightsRequests
from services.trainer.nodes.node_training import NodeTraining
from shared import checkpoints
from shared.bus.base import Incoming
from shared.checkpoints import Checkpoint
from shared.errors import RefusedError
from shared.messages.weights import RollBackWeights
from tests.unit.trainer.nodes.test_node_training import Driver
from tests.unit.trainer.support import NO_FOLDER, manifest

DEADLINE_S = 60.0


class FakeRollbacks:
    """Keeps which nodes go back."""

    def __init__(self) -> None:
        self.asked: list[NodeTraining] = []

    async def order(self, nodes: Sequence[NodeTraining], target: Checkpoint, run_all: RunAll) -> int:
        self.asked += nodes
        return 3


class Uneven(FakeRollbacks):
    """Node 0 refuses at once, node 1 takes its time."""

    def __init__(self, slow: NodeTraining) -> None:
        super().__init__()
        self.slow = slow
        self.has_refused, self.may_end = asyncio.Event(), asyncio.Event()

    async def order(self, nodes: Sequence[NodeTraining], target: Checkpoint, run_all: RunAll) -> int:
        if self.slow not in nodes:
            self.has_refused.set()
            raise RefusedError("the disk is full", code=503)
        await self.may_end.wait()
        return await super().order(nodes, target, run_all)


async def test_nodes_are_not_asked_again_while_one_of_them_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {number: Driver().node for number in (0, 1)}
    rollbacks = Uneven(known[1])
    requests = WeightsRequests(
        root=NO_FOLDER,
        model="m",
        stream="s",
        nodes=SimpleNamespace(by_number=known),
        rollbacks=rollbacks,
        run_all=lambda decided: None,
        shares_weights=False,
    )
    monkeypatch.setattr(checkpoints, "checkpoints", lambda *_: [Checkpoint(manifest(1), NO_FOLDER)])
    first = asyncio.create_task(requests.roll_back(Incoming(RollBackWeights(version=1), "")))
    await rollbacks.has_refused.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    with pytest.raises(RefusedError, match="going back already"):
        async with asyncio.timeout(DEADLINE_S):
            await requests.roll_back(Incoming(RollBackWeights(version=1, node=1), ""))
    rollbacks.may_end.set()
    with pytest.raises(RefusedError, match="the disk is full"):
        await first
    assert rollbacks.asked == [known[1]]


async def test_a_node_that_comes_while_the_version_is_looked_for_goes_back_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known, rollbacks = {0: Driver().node}, FakeRollbacks()
    requests = WeightsRequests(
        root=NO_FOLDER,
        model="m",
        stream="s",
        nodes=SimpleNamespace(by_number=known),
        rollbacks=rollbacks,
        run_all=lambda decided: None,
        shares_weights=True,
    )

    def found(root: Path, node: int) -> list[Checkpoint]:
        known[1] = Driver().node
        return [Checkpoint(manifest(1), NO_FOLDER)]

    monkeypatch.setattr(checkpoints, "nodes", lambda root: [0])
    monkeypatch.setattr(checkpoints, "checkpoints", found)
    answer = await requests.roll_back(Incoming(RollBackWeights(version=1), ""))

    assert rollbacks.asked == [known[0], known[1]]
    assert (answer.nodes, answer.num_discarded) == ((0, 1), 3)
