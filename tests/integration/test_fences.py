"""A stage follows the fences that the trainer's lease allows, whoever sends it others."""

from pathlib import Path

import pytest

from services.trainer.nodes.lease import TrainerLease
from shared.bus.base import Lease
from shared.bus.memory import MemoryBroker
from shared.errors import BusError, ConfigurationError, RefusedError
from shared.messages.training import BatchStepped, StepOrder, TrainingFailed
from shared.messages.weights import AllowedFences, RestoreWeights, SavedWeights
from shared.subjects import STEP, TRAINER_LEASE
from tests.support.models import save_tiny_model
from tests.support.node import Node, running_node
from tests.support.training import messages, random_batches

ADAMW = {"optimizer": "adamw"}
ENORMOUS = (1 << 63) - 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model("llama_tied", tmp_path / "model")
    return tmp_path / "model"


async def restore(node: Node, fence: int) -> None:
    """Order a restore without asking whether a lease allows it."""
    await node.order_restore(RestoreWeights(fence=fence, weights=SavedWeights(version=0, checkpoint="")))


async def refused(node: Node, fence: int) -> tuple[int, str]:
    with pytest.raises(RefusedError) as refusal:
        await restore(node, fence)
    return refusal.value.code, refusal.value.reason


async def step(node: Node, batch_id: str, fence: int) -> tuple[str, int]:
    """Train on a batch; returns the first batch that steps from now on, and the version that it makes."""
    for message in messages(batch_id, random_batches(1, 2)[0], fence=fence):
        await node.feed(message)
    while True:
        event = (await node.report()).event
        assert not isinstance(event, TrainingFailed)
        if isinstance(event, BatchStepped):
            return event.batch_id, event.version


async def test_no_restore_but_what_the_lease_allows_changes_anything(folder: Path, tmp_path: Path) -> None:
    async with running_node(folder, 2, tmp_path, **ADAMW) as node:
        await node.restore(fence=5)
        assert await step(node, "a", 5) == ("a", 1)
        for replayed in (0, 4, 5):
            assert await refused(node, replayed) == (409, f"fence {replayed} is over, this stage follows 5")
        for forged in (6, ENORMOUS):
            assert await refused(node, forged) == (403, f"no lease allows fence {forged}")
        with pytest.raises(RefusedError, match="is not 5, which this stage follows"):
            await node.save(1, tmp_path / "checkpoints" / "forged", fence=ENORMOUS)
        await node.bus.publish(
            STEP.at(node=0, stage=0),
            StepOrder(fence=ENORMOUS, batch_id="a", version=7, learning_rate=1.0),
        )
        assert await step(node, "b", 5) == ("b", 2)


async def test_a_lease_that_cannot_be_read_is_no_reason_to_believe(folder: Path, tmp_path: Path) -> None:
    broker = MemoryBroker()
    async with running_node(folder, 1, tmp_path, broker=broker, **ADAMW) as node:
        assert await refused(node, 1) == (403, "no lease allows fence 1")
        broker.leases[TRAINER_LEASE] = Lease(9, b"forged")
        code, reason = await refused(node, 1)
        assert (code, reason.split(":")[0]) == (503, "whether fence 1 is allowed cannot be read")
        broker.leases[TRAINER_LEASE] = Lease(10, AllowedFences(first=1, last=1).pack())
        await restore(node, 1)
        assert await step(node, "a", 1) == ("a", 1)


async def test_an_earlier_trainer_changes_nothing_once_a_later_one_leads(
    folder: Path, tmp_path: Path
) -> None:
    async with running_node(folder, 1, tmp_path, **ADAMW) as node:
        earlier = await TrainerLease.take(node.bus)
        await earlier.allow(earlier.first_fence)
        await restore(node, earlier.first_fence)
        assert await step(node, "a", earlier.first_fence) == ("a", 1)

        later = await TrainerLease.take(node.bus)
        with pytest.raises(ConfigurationError, match="another trainer has taken over"):
            await earlier.allow(earlier.first_fence + 1)
        assert (await refused(node, earlier.first_fence + 1))[0] == 403
        await later.allow(later.first_fence)
        await restore(node, later.first_fence)
        for message in messages("of the earlier", random_batches(1, 2)[0], fence=earlier.first_fence):
            await node.feed(message)
        assert await step(node, "b", later.first_fence) == ("b", 1)
        assert (await refused(node, earlier.first_fence + 2))[0] == 409


async def test_who_holds_the_lease_is_not_driven_out_by_a_claim(caplog: pytest.LogCaptureFixture) -> None:
    broker = MemoryBroker()
    held = await TrainerLease.take(broker.connect())
    assert held.is_later(ENORMOUS)
    await held.check_claim("node 0, stage 0 follows fence 1")
    await held.allow(held.first_fence)
    await held.check_claim("node 0, stage 0 follows fence 2")
    assert [record.getMessage() for record in caplog.records] == [
        f"node 0, stage 0 follows fence {fence}, and no lease allows it: ignored" for fence in (1, 2)
    ]
    await TrainerLease.take(broker.connect())
    with pytest.raises(ConfigurationError, match="another trainer has taken over"):
        await held.check_claim("node 0, stage 0 follows fence 3")


async def test_fences_of_several_nodes_are_allowed_in_any_order() -> None:
    bus = MemoryBroker().connect()
    lease = await TrainerLease.take(bus)
    for fence in (lease.first_fence + 1, lease.first_fence):
        await lease.allow(fence)
    written = await bus.read_lease(TRAINER_LEASE)
    assert written is not None
    allowed = AllowedFences.unpack(written.body)
    assert (allowed.first, allowed.last) == (lease.first_fence, lease.first_fence + 1)
    with pytest.raises(BusError):
        await bus.write_lease(TRAINER_LEASE, b"", revision=written.revision - 1)
