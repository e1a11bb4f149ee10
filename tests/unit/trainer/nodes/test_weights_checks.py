"""When a node is checked, and what comes of it, with stages that a test plays."""

from types import SimpleNamespace
from typing import Any

import pytest

from services.trainer.nodes.weights_checks import CHECK_EVERY_S, CHECK_TIMEOUT_S, NUM_CHECKS, WeightsChecks
from shared.bus.base import Incoming
from shared.messages.inference import InferenceTask, SequenceResult, TaskFailed, TokenLogprob, TokensProduced
from shared.messages.training import CheckForward, CheckScored, StageReport
from shared.model_files import ModelCard

CARD = ModelCard(
    name="m", model_type="", vocab_size=100, context_length=4, bos_token_id=None, eos_token_ids=()
)


class Node:
    """As much of a node as a check looks at: version 3 trains and serves, at rest, without a guard."""

    def __init__(self, published: int | None = None) -> None:
        self.node, self.version, self.life = 0, 3, SimpleNamespace(fence=5)
        self.work = SimpleNamespace(
            publishing=SimpleNamespace(published=published), is_idle=True, is_waiting=False
        )

    @property
    def served_version(self) -> int | None:
        published: int | None = self.work.publishing.published
        return self.version if published is None else published


class Run:
    """Checks of one node, and what they have sent."""

    def __init__(self, node: Node) -> None:
        self.node: Any = node
        self.now_s = 0.0
        self.sent: list[Any] = []
        self.checks = WeightsChecks(
            CARD,
            name="checks",
            bus=SimpleNamespace(),  # type: ignore[arg-type]
            clock=SimpleNamespace(now_s=lambda: self.now_s),  # type: ignore[arg-type]
            outbox=SimpleNamespace(post=lambda _, message: self.sent.append(message)),  # type: ignore[arg-type]
        )

    def look(self, after_s: float = 0.0) -> int:
        """Returns how many checks began."""
        self.now_s += after_s
        before = len(self.sent)
        self.checks.begin_if_due(self.node)
        return sum(isinstance(message, CheckForward) for message in self.sent[before:])

    def score(self, *logprobs: float, version: int = 3, fence: int = 5) -> None:
        event = CheckScored(version=version, logprobs=logprobs, dtype="float32")
        self.checks.scored(StageReport(node=0, stage=1, fence=fence, event=event), event)

    async def serve(self, *logprobs: float, version: int = 3) -> None:
        task = self.sent[-1]
        assert isinstance(task, InferenceTask) and task.deferrable and task.prompt_logprobs
        prompt = tuple(TokenLogprob(token=1, logprob=logprob) for logprob in logprobs)
        result = SequenceResult(task_id=task.task_id, prompt=prompt, finish="length")
        produced = TokensProduced(node=0, weights_version=version, results=(result,))
        await self.checks._on_tokens(Incoming(produced, ""))


@pytest.mark.parametrize("published", [None, 3])
async def test_a_version_is_checked_a_few_times_and_then_left_in_peace(published: int | None) -> None:
    run = Run(Node(published))
    for _ in range(NUM_CHECKS):
        assert run.look(CHECK_EVERY_S) == 1
        assert run.look() == 0, "one is under way"
        run.score(-1.0, -2.0, -3.0)
        await run.serve(-1.0, -2.0, -3.0)
        assert run.look(CHECK_EVERY_S / 2) == 0
    assert run.look(100.0) == 0
    assert (run.checks.differs, run.checks.num_skipped) == ({0: ""}, 0)
    run.node.version = 4
    run.node.work.publishing.published = None if published is None else 4
    assert run.look() == 1, "another version is checked at once"


async def test_what_serves_otherwise_than_it_trains_raises_the_alarm_until_it_agrees() -> None:
    run = Run(Node())
    for served, expected in ((-2.5, True), (-2.0, False)):
        run.look(CHECK_EVERY_S)
        run.score(-1.0, -2.0, -3.0)
        await run.serve(-1.0, served, -3.0)
        assert bool(run.checks.differs[0]) == expected


def test_a_node_that_serves_another_version_than_it_trains_is_not_checked() -> None:
    assert Run(Node(published=2)).look() == 0


@pytest.mark.parametrize("what", ["is_idle", "is_waiting"])
def test_while_stages_may_be_a_step_apart_the_newest_weights_are_not_checked(what: str) -> None:
    run = Run(Node())
    setattr(run.node.work, what, what != "is_idle")
    assert run.look() == 0


async def test_a_check_that_a_step_overtakes_comes_to_nothing() -> None:
    run = Run(Node())
    run.look()
    run.score()
    assert run.checks.num_skipped == 1, "a stage had other weights"
    run.look(CHECK_EVERY_S)
    run.node.work.is_idle = False
    run.score(-1.0, -2.0, -3.0)
    assert run.checks.num_skipped == 2
    run.node.work.is_idle = True
    run.look(CHECK_EVERY_S)
    run.score(-1.0, -2.0, -3.0)
    await run.serve(-9.0, -9.0, -9.0, version=4)
    assert (run.checks.differs, run.checks.num_skipped) == ({}, 3)


@pytest.mark.parametrize("served", [(), (-1.0, -2.0), (-1.0, -2.0, -3.0, -4.0)])
async def test_a_check_whose_result_is_of_another_length_comes_to_nothing(served: tuple[float, ...]) -> None:
    run = Run(Node())
    run.look()
    run.score(-1.0, -2.0, -3.0)
    await run.serve(*served)
    assert (run.checks.differs, run.checks.num_skipped) == ({}, 1)
    assert run.look(CHECK_EVERY_S) == 1


async def test_a_check_that_fails_or_is_lost_is_made_again() -> None:
    run = Run(Node())
    run.look()
    run.score(-1.0, -2.0, -3.0)
    failed = TaskFailed(task_id=run.sent[-1].task_id, code=503, reason="gone")
    await run.checks._on_failed(Incoming(failed, ""))
    assert run.look(CHECK_EVERY_S) == 1
    run.score(-1.0, -2.0, -3.0, fence=4)
    assert run.look(CHECK_TIMEOUT_S - 1) == 0
    assert run.look(1.0) == 1
    assert run.checks.num_skipped == 2
