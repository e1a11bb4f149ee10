"""When a cluster takes training batches."""

import pytest

from lemix import steps
from shared.bus.base import Incoming
from shared.bus.memory import MemoryBroker
from shared.messages.cluster import ClusterStatus, NodeStatus, StatusRequest
from shared.subjects import STATUS
from tests.support.cluster import heartbeat


async def test_nodes_are_waited_for_until_the_trainer_has_restored_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "POLL_S", 0.0)
    bus = MemoryBroker().connect()
    epochs = iter([0, 0, 7])

    async def status(incoming: Incoming[StatusRequest]) -> ClusterStatus:
        stage = heartbeat(0).model_copy(update={"epoch": next(epochs)})
        node = NodeStatus(node=0, ready=True, inference_tasks=0, training_tasks=0, stages=(stage,))
        return ClusterStatus(policy="p", nodes=(node,))

    await bus.respond(STATUS.at(), status)

    assert await steps.wait_nodes_ready(bus, 1) == {0: 0}
    assert list(epochs) == []
