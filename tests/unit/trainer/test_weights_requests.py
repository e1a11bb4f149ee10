"""Which nodes a rollback is asked of."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.trainer.node_training import NodeTraining
from services.trainer.weights_requests import WeightsRequests
from shared import checkpoints
from shared.bus.base import Incoming
from shared.checkpoints import Checkpoint
from shared.messages.weights import RollBackWeights
from tests.unit.trainer.support import NO_FOLDER
from tests.unit.trainer.test_checkpoint_files import manifest
from tests.unit.trainer.test_node_training import Driver


class Actions:
    """Keeps which nodes go back."""

    def __init__(self) -> None:
        self.asked: list[NodeTraining] = []

    async def roll_back(self, nodes: Sequence[NodeTraining], target: Checkpoint) -> int:
        self.asked += nodes
        return 3


async def test_a_node_that_comes_while_the_version_is_looked_for_goes_back_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known, actions = {0: Driver().node}, Actions()
    requests = WeightsRequests(
        root=NO_FOLDER, nodes=SimpleNamespace(by_number=known), actions=actions, merges=True
    )

    def found(root: Path, node: int) -> list[Checkpoint]:
        known[1] = Driver().node
        return [Checkpoint(manifest(1), NO_FOLDER)]

    monkeypatch.setattr(checkpoints, "nodes", lambda root: [0])
    monkeypatch.setattr(checkpoints, "checkpoints", found)
    answer = await requests.roll_back(Incoming(RollBackWeights(version=1), ""))

    assert actions.asked == [known[0], known[1]]
    assert (answer.nodes, answer.num_discarded) == ((0, 1), 3)
