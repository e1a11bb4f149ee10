"""Has nodes score the guard's examples: tasks go straight to stage 0, results come back here.

The first version writes samples before it is scored, where a run has none yet. Scoring is deferrable. Writing
is not: it is done once in a run's life.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan

from services.trainer.outbox import Outbox
from services.trainer.publication.evaluation import Evaluation
from services.trainer.publication.losses import Losses
from services.trainer.publication.samples import Drawing, Samples
from shared.bus.base import Bus, Incoming
from shared.clock import Clock
from shared.encoding import LabelledTokens
from shared.messages.inference import CancelTask, InferenceTask, Sampling, TaskFailed, TokensProduced
from shared.model_files import ModelCard
from shared.subjects import ASSIGN, CANCEL, FAILED, TOKENS

DEADLINE_S = 600.0
"""An evaluation that takes longer is given up."""
RETRY_S = 1.0
"""Until a task that has failed is sent again: a node that has lost a stage needs its time."""

Outcome = Callable[[Losses | None], None]
"""Gets the version's losses, which may be no numbers; None: they could not be found."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardExamples:
    """The examples that versions are evaluated on."""

    card: ModelCard
    held_out: Sequence[LabelledTokens] = ()
    openings: Sequence[tuple[int, ...]] = ()
    """Prompts after which the first version writes samples, if it has not yet."""
    samples: Samples | None = None
    """Those that it has written."""


@dataclass(slots=True)
class _Running:
    version: int
    deadline_s: float
    work: Drawing | Evaluation
    held_out: Sequence[LabelledTokens]
    report: Outcome


class Evaluator:
    """Runs at most one evaluation for each node; a new one replaces the one before."""

    def __init__(
        self,
        examples: GuardExamples,
        *,
        name: str,
        bus: Bus,
        clock: Clock,
        outbox: Outbox,
        keep: Callable[[Samples], object],
        held_out: Callable[[], Sequence[LabelledTokens]] = tuple,
    ) -> None:
        """`name`: where results come back to, as a gateway's id; `keep`: is given samples, once written.

        `held_out`: the examples that the run holds out by itself, beside those of `examples`.
        """
        self._examples = examples
        self._held_out = held_out
        self._samples = examples.samples
        self._name = name
        self._bus = bus
        self._clock = clock
        self._outbox = outbox
        self._keep = keep
        self._numbers = itertools.count()
        self._running: dict[int, _Running] = {}

    async def subscribe(self) -> None:
        """Listen for results."""
        await self._bus.subscribe(TOKENS.at(gateway=self._name), self._on_tokens)
        await self._bus.subscribe(FAILED.at(gateway=self._name), self._on_failed)

    async def run(self) -> None:
        """Ask again for what has failed, and give up what is too late; runs until cancelled."""
        while True:
            await asyncio.sleep(RETRY_S)
            for node, running in list(self._running.items()):
                if self._running.get(node) is not running:
                    continue  # replaced by what came of another
                if self._clock.now_s() > running.deadline_s:
                    self._give_up(node, f"not done within {DEADLINE_S:g} s")
                else:
                    self._advance(node, running)

    def begin(self, node: int, version: int, report: Outcome) -> None:
        """Evaluate a version that the node's stages keep; `report` is called in the end, unless dropped.

        It writes the samples first, where they are wanted and there are none yet. Where there is nothing to
        score, `run` tells so: never this call, whose caller may not be done.
        """
        self.drop(node)
        is_first = self._examples.openings and self._samples is None
        held_out = (*self._examples.held_out, *self._held_out())
        work = self._drawing(version) if is_first else self._evaluation(held_out)
        running = _Running(version, self._clock.now_s() + DEADLINE_S, work, held_out, report)
        self._running[node] = running
        self._ask(node, running)

    @property
    def versions(self) -> set[int]:
        """Those that are evaluated now."""
        return {running.version for running in self._running.values()}

    def drop(self, node: int) -> None:
        """The node's stages begin anew: nobody wants to know any more."""
        if running := self._running.pop(node, None):
            for task_id in running.work.asked:
                self._outbox.post(CANCEL.at(node=node), CancelTask(task_id=task_id))

    def _drawing(self, version: int) -> Drawing:
        card = self._examples.card
        return Drawing(
            self._new_name(),
            version,
            self._examples.openings,
            max_tokens=card.context_length,
            stop_token_ids=card.eos_token_ids,
        )

    def _evaluation(self, held_out: Sequence[LabelledTokens]) -> Evaluation:
        samples = self._samples
        is_of_use = samples is not None and not samples.are_noise(self._examples.card.vocab_size)
        own = samples.examples if samples is not None and is_of_use else ()
        return Evaluation(self._new_name(), held_out, own)

    def _new_name(self) -> str:
        return f"{self._name}-{next(self._numbers)}"

    def _advance(self, node: int, running: _Running) -> None:
        """Ask for what there is to ask, and tell what is known."""
        if isinstance(running.work, Drawing) and (samples := running.work.samples):
            self._wrote(samples)
            running.work = self._evaluation(running.held_out)
        if isinstance(running.work, Evaluation) and (losses := running.work.losses):
            self._evaluated(node, running, *losses)
            return
        self._ask(node, running)

    def _ask(self, node: int, running: _Running) -> None:
        for task in self._tasks(running):
            self._outbox.post(ASSIGN.at(node=node), task)

    def _tasks(self, running: _Running) -> list[InferenceTask]:
        task = partial(
            InferenceTask, gateway=self._name, timeout_s=DEADLINE_S, weights_version=running.version
        )
        if isinstance(running.work, Drawing):
            return [
                task(task_id=task_id, prompt=prompt, sampling=sampling)
                for task_id, (prompt, sampling) in running.work.next().items()
            ]
        scoring = Sampling(max_tokens=0, num_logprobs=0)
        return [
            task(task_id=task_id, prompt=tokens, sampling=scoring, prompt_logprobs=True, deferrable=True)
            for task_id, tokens in running.work.next().items()
        ]

    async def _on_tokens(self, incoming: Incoming[TokensProduced]) -> None:
        node, running = incoming.message.node, self._running.get(incoming.message.node)
        if running is None:
            return
        for result in incoming.message.results:
            if isinstance(running.work, Drawing):
                running.work.drew(result)
            else:
                running.work.scored(result)
        self._advance(node, running)

    def _wrote(self, samples: Samples) -> None:
        """Samples are there; another node may have written them first."""
        if self._samples is not None:
            return
        self._samples = samples
        self._keep(samples)
        num, loss = len(samples.examples), samples.loss
        if samples.are_noise(self._examples.card.vocab_size):
            log.warning("the model knows too little for its own samples to guard it (loss %.4f)", loss)
        else:
            log.info("version %d wrote %d samples (loss %.4f)", samples.version, num, loss)

    def _evaluated(self, node: int, running: _Running, held_out: float | None, samples: float | None) -> None:
        del self._running[node]
        first = self._samples.loss if self._samples is not None else nan
        losses = Losses(
            held_out=held_out,
            num_held_out=len(running.held_out),
            samples=samples,
            samples_rise=0.0 if samples is None else samples - first,
        )
        log.info("node %d: version %d: %s", node, running.version, losses)
        running.report(losses)

    async def _on_failed(self, incoming: Incoming[TaskFailed]) -> None:
        failed = incoming.message
        for node, running in list(self._running.items()):
            if failed.task_id in running.work.asked:
                running.work.failed(failed.task_id)
                if failed.code == 400:
                    self._give_up(node, failed.reason)
                elif failed.code == 500:  # its logits are not finite, and will not be
                    log.error("node %d: version %d: %s", node, running.version, failed.reason)
                    self.drop(node)
                    running.report(_not_finite(running))

    def _give_up(self, node: int, reason: str) -> None:
        running = self._running[node]
        log.error("node %d: version %d is not evaluated: %s", node, running.version, reason)
        self.drop(node)
        running.report(None)


def _not_finite(running: _Running) -> Losses:
    return Losses(held_out=nan, num_held_out=len(running.held_out), samples=nan, samples_rise=nan)
