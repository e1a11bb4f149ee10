"""All nodes together: whether there is room for one more batch, and which nodes fit the run."""

import asyncio
from math import nan
from types import SimpleNamespace
from typing import Any

import pytest

from services.trainer.ledger.ledger import Ledger
from services.trainer.ledger.pending_batches import BatchBook
from services.trainer.nodes.lease import TrainerLease
from services.trainer.nodes.stage_listener import Nodes
from services.trainer.settings import TrainerSettings
from shared.bus.base import Incoming
from shared.errors import ConfigurationError
from tests.support.cluster import heartbeat
from tests.unit.trainer.nodes.test_node_training import Driver


def nodes(**settings: Any) -> Nodes:
    return Nodes(
        TrainerSettings(**settings),
        bus=SimpleNamespace(num_reconnects=0),  # type: ignore[arg-type]
        clock=SimpleNamespace(now_s=lambda: 0.0),  # type: ignore[arg-type]
        book=BatchBook(Ledger()),
        actions=SimpleNamespace(run=lambda node, actions: None),  # type: ignore[arg-type]
        progress=SimpleNamespace(),  # type: ignore[arg-type]
        verdicts=SimpleNamespace(),  # type: ignore[arg-type]
        checks=None,
        by_number={},
        lease=TrainerLease(SimpleNamespace(), term=1),  # type: ignore[arg-type]
    )


def hear(listener: Nodes, node: int, num_stages: int) -> None:
    for stage in range(num_stages):
        beat = heartbeat(node, stage, num_stages=num_stages)
        asyncio.run(listener.on_heartbeat(Incoming(beat, "")))


def test_what_a_node_that_trains_no_more_ends_takes_no_room_from_others() -> None:
    halted = Driver(max_skips=1).open()
    for batch_id in ("a", "b", "c"):
        halted.place(batch_id)
    halted.gather("a", nan)
    halted.step("a", 0)
    them = nodes()
    them.by_number = {0: halted.node, 1: Driver(microbatches=4).open().node}

    assert halted.node.work.gate.halt_reason
    assert len(halted.node.work.steps.placed.batch_ids) == them.num_wanted == 2
    assert them.have_room


@pytest.mark.parametrize("settings", [{"merge": "average"}, {"merge": "outer"}, {"merge": "allreduce"}])
def test_nodes_that_share_their_weights_have_as_many_stages(settings: dict[str, str]) -> None:
    them = nodes(**settings)
    hear(them, 0, 2)
    them.by_number[0].allow_restore(0)
    hear(them, 1, 2)

    with pytest.raises(ConfigurationError, match="node 2 has 3 stages, and node 0 has 2"):
        hear(them, 2, 3)


def test_a_node_that_comes_during_a_rollback_is_taken_in_when_the_others_are_back() -> None:
    them = nodes(merge="average")
    hear(them, 0, 2)
    them.by_number[0].roll_back(0)
    hear(them, 1, 2)
    assert list(them.by_number) == [0]

    them.by_number[0].rolled_back("")
    hear(them, 1, 2)
    assert list(them.by_number) == [0, 1]


def test_nodes_that_train_apart_may_have_different_stages() -> None:
    them = nodes()
    for node, num_stages in enumerate((2, 3)):
        hear(them, node, num_stages)

    assert [node.life.members.num_stages for node in them.by_number.values()] == [2, 3]


def test_data_parallel_nodes_have_one_stage() -> None:
    with pytest.raises(ConfigurationError, match="schedule=dp is for nodes of one stage, and node 0 has 2"):
        hear(nodes(schedule="dp"), 0, 2)
