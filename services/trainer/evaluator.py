"""Has nodes score the held-out examples: deferrable tasks go straight to stage 0, results come back here."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan

from services.trainer.evaluation import Evaluation
from services.trainer.outbox import Outbox
from shared.bus.base import Bus, Incoming
from shared.clock import Clock
from shared.encoding import LabelledTokens
from shared.messages.inference import CancelTask, InferenceTask, Sampling, TaskFailed, TokensProduced
from shared.subjects import ASSIGN, CANCEL, FAILED, TOKENS

DEADLINE_S = 600.0
"""An evaluation that takes longer is given up."""
RETRY_S = 1.0
"""Until a task that has failed is sent again: a node that has lost a stage needs its time."""

Outcome = Callable[[float | None], None]
"""Is told the mean loss per learnt token, which may be no number; None: it could not be found."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Running:
    version: int
    deadline_s: float
    evaluation: Evaluation
    tell: Outcome


class Evaluator:
    """Runs at most one evaluation for each node; a new one replaces the one before."""

    def __init__(
        self,
        examples: Sequence[LabelledTokens],
        *,
        name: str,
        bus: Bus,
        clock: Clock,
        outbox: Outbox,
    ) -> None:
        """`name`: where results come back to, as a gateway's id."""
        self._examples = examples
        self._name = name
        self._bus = bus
        self._clock = clock
        self._outbox = outbox
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
                if self._clock.now_s() > running.deadline_s:
                    self._give_up(node, f"not done within {DEADLINE_S:g} s")
                else:
                    self._ask(node, running)

    def begin(self, node: int, version: int, tell: Outcome) -> None:
        """Evaluate a version that the node's stages keep; `tell` is called in the end, unless dropped."""
        self.drop(node)
        evaluation = Evaluation(f"{self._name}-{next(self._numbers)}", self._examples)
        running = _Running(version, self._clock.now_s() + DEADLINE_S, evaluation, tell)
        self._running[node] = running
        self._ask(node, running)

    @property
    def versions(self) -> set[int]:
        """Those that are evaluated now."""
        return {running.version for running in self._running.values()}

    def drop(self, node: int) -> None:
        """The node's stages begin anew: nobody wants to know any more."""
        if running := self._running.pop(node, None):
            for task_id in running.evaluation.asked:
                self._outbox.post(CANCEL.at(node=node), CancelTask(task_id=task_id))

    def _ask(self, node: int, running: _Running) -> None:
        for task_id, tokens in running.evaluation.next().items():
            task = InferenceTask(
                task_id=task_id,
                gateway=self._name,
                prompt=tokens,
                sampling=Sampling(max_tokens=0, num_logprobs=0),
                prompt_logprobs=True,
                timeout_s=DEADLINE_S,
                deferrable=True,
                weights_version=running.version,
            )
            self._outbox.post(ASSIGN.at(node=node), task)

    async def _on_tokens(self, incoming: Incoming[TokensProduced]) -> None:
        node, running = incoming.message.node, self._running.get(incoming.message.node)
        if running is None:
            return
        for result in incoming.message.results:
            running.evaluation.scored(result)
        if (loss := running.evaluation.loss) is None:
            self._ask(node, running)
            return
        del self._running[node]
        log.info("node %d: held-out loss of version %d: %.4f", node, running.version, loss)
        running.tell(loss)

    async def _on_failed(self, incoming: Incoming[TaskFailed]) -> None:
        failed = incoming.message
        for node, running in list(self._running.items()):
            if failed.task_id in running.evaluation.asked:
                running.evaluation.failed(failed.task_id)
                if failed.code == 400:
                    self._give_up(node, failed.reason)
                elif failed.code == 500:  # its logits are not finite, and will not be
                    log.error("node %d: version %d: %s", node, running.version, failed.reason)
                    self.drop(node)
                    running.tell(nan)

    def _give_up(self, node: int, reason: str) -> None:
        running = self._running[node]
        log.error("node %d: version %d is not evaluated: %s", node, running.version, reason)
        self.drop(node)
        running.tell(None)
