"""What is decided for several nodes together is carried out before anything else is decided."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from services.trainer.batches import BatchBook
from services.trainer.merging import Merging
from services.trainer.node_actions import Action, Closed, Restore
from services.trainer.node_training import NodeTraining
from services.trainer.settings import TrainerSettings
from services.trainer.versions import Ledger
from shared.clock import Clock
from shared.errors import BusError
from tests.unit.trainer.test_merges import averaging


class LostBus:
    """No stage answers."""

    async def request(self, *args: Any, **kwargs: Any) -> Any:
        raise BusError("no answer")


class Runner:
    """Keeps what nodes have decided, and has the nodes looked at as the real one does."""

    def __init__(self) -> None:
        self.done: list[tuple[int, str]] = []
        self.merging: Merging

    def run(self, node: NodeTraining, actions: Sequence[Action]) -> None:
        self.done += [(node.node, type(each).__name__) for each in actions]
        self.merging.look()


async def test_all_are_closed_after_a_merge_that_fails_before_one_begins_anew() -> None:
    replicas = averaging().open()
    for node in replicas.nodes:
        replicas.apply(node, f"a{node}", 1)
        replicas.beat(node)
    runner = Runner()
    clock: Clock = SimpleNamespace(now_s=lambda: 0.0)  # type: ignore[assignment]
    async with asyncio.TaskGroup() as tasks:
        runner.merging = Merging(
            TrainerSettings(merge="average", merge_every=1),
            bus=LostBus(),  # type: ignore[arg-type]
            clock=clock,
            book=BatchBook(Ledger()),
            actions=runner,  # type: ignore[arg-type]
            nodes=replicas.nodes,
            new_name=lambda: "merge",
            tasks=tasks,
        )
        runner.merging.look()
    for node in replicas.nodes:
        assert (node, Closed.__name__) in runner.done
    closed = [place for place, (_, what) in enumerate(runner.done) if what == Closed.__name__]
    begun = [place for place, (_, what) in enumerate(runner.done) if what == Restore.__name__]
    assert not begun or max(closed) < min(begun)
