"""What is decided for several nodes together is carried out before anything else is decided."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from services.trainer.ledger.ledger import Ledger
from services.trainer.ledger.pending_batches import BatchBook
from services.trainer.nodes.decisions import Action, Closed
from services.trainer.nodes.node_training import NodeTraining
from services.trainer.outbox import Outbox
from services.trainer.settings import TrainerSettings
from services.trainer.sharing.average import Merges
from services.trainer.sharing.decisions import Decision, Nodes
from services.trainer.sharing.runner import Sharing
from shared.clock import Clock
from shared.errors import BusError
from tests.unit.trainer.sharing.test_average import averaging


class LostBus:
    """No stage answers."""

    async def request(self, *args: Any, **kwargs: Any) -> Any:
        raise BusError("no answer")


class Runner:
    """Keeps which nodes have closed, and has the nodes looked at as the real one does."""

    def __init__(self) -> None:
        self.closed: list[int] = []
        self.is_running = False
        self.sharing: Sharing

    def run(self, node: NodeTraining, actions: Sequence[Action]) -> None:
        self.closed += [node.node for action in actions if isinstance(action, Closed)]
        self.is_running = True
        self.sharing.decide(self.run)
        self.is_running = False


async def test_all_are_closed_after_a_merge_that_fails_before_anything_is_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replicas = averaging().open()
    for node in replicas.nodes:
        replicas.apply(node, f"a{node}", 1)
        replicas.beat(node)
    runner = Runner()
    undisturbed = Merges.decide

    def decide(merges: Merges, nodes: Nodes, now_s: float) -> list[Decision]:
        assert not runner.is_running
        return undisturbed(merges, nodes, now_s)

    monkeypatch.setattr(Merges, "decide", decide)
    clock: Clock = SimpleNamespace(now_s=lambda: 0.0)  # type: ignore[assignment]
    async with asyncio.TaskGroup() as tasks:
        runner.sharing = Sharing(
            TrainerSettings(merge="average", merge_every=1),
            bus=LostBus(),  # type: ignore[arg-type]
            clock=clock,
            book=BatchBook(Ledger()),
            outbox=Outbox(LostBus()),  # type: ignore[arg-type]
            nodes=replicas.nodes,
            new_name=lambda: "merge",
            tasks=tasks,
        )
        runner.sharing.decide(runner.run)
    assert runner.closed == [0, 1]
