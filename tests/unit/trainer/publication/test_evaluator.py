"""Evaluations whose tasks fail, and samples that are to be written first."""

import asyncio
from math import isnan, log

import pytest

from lemix.simulation.loop import VirtualClock, run_virtual
from services.trainer.outbox import Outbox
from services.trainer.publication.evaluator import Evaluator, GuardExamples
from services.trainer.publication.losses import Losses
from services.trainer.publication.samples import Samples
from shared.bus.base import Incoming
from shared.bus.memory import MemoryBroker
from shared.encoding import LabelledTokens
from shared.messages.inference import (
    InferenceTask,
    SequenceResult,
    TaskFailed,
    TokenLogprob,
    TokensProduced,
)
from shared.model_files import ModelCard
from shared.subjects import ASSIGN, FAILED, TOKENS

EXAMPLES = [LabelledTokens((1, 2, 3), (0, 1))]
OPENINGS = ((7, 8), (9,))
CARD = ModelCard(
    name="m", model_type="", vocab_size=100, context_length=34, bos_token_id=None, eos_token_ids=(5,)
)


class FakeStage:
    """Fails as it is told, or writes its task's last prompt token again and again, each with `logprob`."""

    def __init__(self, code: int = 0, logprob: float = -1.0) -> None:
        self.tasks: list[InferenceTask] = []
        self.code = code
        self.logprob = logprob

    async def start(self, broker: MemoryBroker) -> None:
        self._bus = broker.connect()
        await self._bus.subscribe(ASSIGN.at(node=0), self._on_task)

    async def _on_task(self, incoming: Incoming[InferenceTask]) -> None:
        task = incoming.message
        self.tasks.append(task)
        if self.code:
            failure = TaskFailed(task_id=task.task_id, code=self.code, reason="for a reason")
            await self._bus.publish(FAILED.at(gateway=task.gateway), failure)
            return
        for result in self._results(task):
            produced = TokensProduced(node=0, weights_version=task.weights_version or 0, results=(result,))
            await self._bus.publish(TOKENS.at(gateway=task.gateway), produced)

    def _results(self, task: InferenceTask) -> list[SequenceResult]:
        token = TokenLogprob(token=task.prompt[-1], logprob=self.logprob)
        if task.prompt_logprobs:
            scored = (token,) * (len(task.prompt) - 1)
            return [SequenceResult(task_id=task.task_id, prompt=scored, finish="length")]
        places = range(task.sampling.max_tokens)
        return [
            SequenceResult(
                task_id=task.task_id,
                token=token,
                index=place,
                finish="length" if place == places[-1] else None,
            )
            for place in places
        ]


async def outcome(
    stage: FakeStage, examples: GuardExamples, kept: list[Samples] | None = None
) -> Losses | None:
    """The evaluation of version 5 is begun, and its outcome awaited."""
    loop, broker = asyncio.get_running_loop(), MemoryBroker()
    bus = broker.connect()
    outbox, told = Outbox(bus), loop.create_future()
    evaluator = Evaluator(
        examples,
        name="eval",
        bus=bus,
        clock=VirtualClock(loop),
        outbox=outbox,
        keep=([] if kept is None else kept).append,
    )
    await evaluator.subscribe()
    await stage.start(broker)
    running = [asyncio.create_task(each.run()) for each in (outbox, evaluator)]
    evaluator.begin(0, 5, told.set_result)
    assert not told.done(), "whoever begins may be in the middle of something"
    losses: Losses | None = await told
    for each in running:
        each.cancel()
    await bus.close()
    return losses


def test_a_version_whose_logits_are_not_finite_has_no_finite_loss() -> None:
    losses = run_virtual(outcome(FakeStage(500), GuardExamples(card=CARD, held_out=EXAMPLES)))
    assert losses is not None and losses.held_out is not None and isnan(losses.held_out)


@pytest.mark.parametrize("code", [400, 503])
def test_what_cannot_be_evaluated_has_no_loss(code: int) -> None:
    """At once when the task is wrong, else after the deadline: the node may come back."""
    assert run_virtual(outcome(FakeStage(code), GuardExamples(card=CARD, held_out=EXAMPLES))) is None


def test_the_first_version_writes_samples_and_is_scored_on_them() -> None:
    stage, kept = FakeStage(), list[Samples]()
    losses = run_virtual(outcome(stage, GuardExamples(card=CARD, openings=OPENINGS), kept))
    assert losses == Losses(samples=pytest.approx(1.0), samples_rise=pytest.approx(0.0))
    written = Samples(
        5,
        1.0,
        (
            LabelledTokens((7, 8, *[8] * 32), tuple(range(1, 33))),
            LabelledTokens((9, *[9] * 32), tuple(range(32))),
        ),
    )
    assert kept == [written]
    drawn, scored = stage.tasks[:2], stage.tasks[2:]
    assert [task.prompt for task in drawn] == [*OPENINGS]
    assert {(task.sampling.temperature, task.sampling.stop_token_ids) for task in drawn} == {(1.0, (5,))}
    assert len({task.sampling.seed for task in drawn}) == 2
    assert sorted(task.prompt for task in scored) == sorted(each.tokens for each in written.examples)
    assert {(task.weights_version, task.deferrable) for task in scored} == {(5, True)}


def test_a_later_version_is_compared_with_what_was_written() -> None:
    samples = Samples(0, 0.25, (LabelledTokens((1, 2, 3), (1,)),))
    stage, examples = FakeStage(), GuardExamples(card=CARD, openings=OPENINGS, samples=samples)
    losses = run_virtual(outcome(stage, examples))
    assert losses == Losses(samples=pytest.approx(1.0), samples_rise=pytest.approx(0.75))
    assert [task.prompt for task in stage.tasks] == [(1, 2, 3)]


def test_samples_of_a_model_that_knows_nothing_guard_nothing() -> None:
    stage, kept = FakeStage(logprob=-log(CARD.vocab_size)), list[Samples]()
    assert run_virtual(outcome(stage, GuardExamples(card=CARD, openings=OPENINGS), kept)) == Losses()
    assert len(kept) == 1


def test_with_no_examples_yet_the_outcome_comes_later_and_has_no_loss() -> None:
    stage = FakeStage()
    assert run_virtual(outcome(stage, GuardExamples(card=CARD))) == Losses()
    assert not stage.tasks
