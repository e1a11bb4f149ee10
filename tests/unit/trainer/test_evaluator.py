"""What becomes of an evaluation whose tasks fail."""

import asyncio
from math import isnan

import pytest

from lemix.simulation.loop import VirtualClock, run_virtual
from services.trainer.evaluator import Evaluator
from services.trainer.outbox import Outbox
from shared.bus.base import Incoming
from shared.bus.memory import MemoryBroker
from shared.encoding import LabelledTokens
from shared.messages.inference import InferenceTask, TaskFailed
from shared.subjects import ASSIGN, FAILED

EXAMPLES = [LabelledTokens((1, 2, 3), (0, 1))]


async def outcome(code: int) -> float | None:
    """Of an evaluation whose first task fails with that code."""
    loop, bus = asyncio.get_running_loop(), MemoryBroker().connect()
    outbox, told = Outbox(bus), loop.create_future()
    evaluator = Evaluator(EXAMPLES, name="eval", bus=bus, clock=VirtualClock(loop), outbox=outbox)
    await evaluator.subscribe()

    async def on_task(incoming: Incoming[InferenceTask]) -> None:
        failure = TaskFailed(task_id=incoming.message.task_id, code=code, reason="for a reason")
        await bus.publish(FAILED.at(gateway="eval"), failure)

    await bus.subscribe(ASSIGN.at(node=0), on_task)
    running = [asyncio.create_task(each.run()) for each in (outbox, evaluator)]
    evaluator.begin(0, 5, told.set_result)
    loss: float | None = await told
    for each in running:
        each.cancel()
    await bus.close()
    return loss


def test_a_version_whose_logits_are_not_finite_has_no_finite_loss() -> None:
    loss = run_virtual(outcome(500))
    assert loss is not None and isnan(loss)


@pytest.mark.parametrize("code", [400, 503])
def test_what_cannot_be_evaluated_has_no_loss(code: int) -> None:
    """At once when the task is wrong, else after the deadline: the node may come back."""
    assert run_virtual(outcome(code)) is None
