"""Compares the weights that serve with those that train: an alarm for stale or torn ones.

A node is checked where it serves the version that it trains on: soon after that is so, and a few times more,
because requests change to copies in faster layouts by and by. First a few tokens go forward as for training
(`CheckForward`), then the same ones as a request that can wait.
"""

import itertools
import logging
from dataclasses import dataclass
from math import inf

from services.trainer.nodes.node_training import NodeTraining
from services.trainer.outbox import Outbox
from services.trainer.publication.agreement import disagreement, tokens_to_score
from shared.bus.base import Bus, Incoming
from shared.clock import Clock
from shared.messages.inference import InferenceTask, Sampling, TaskFailed, TokensProduced
from shared.messages.training import CheckForward, CheckScored, StageReport
from shared.model_files import ModelCard
from shared.subjects import ASSIGN, CHECK, FAILED, TOKENS

NUM_CHECKS = 4
"""Each version that trains and serves is compared so often."""
CHECK_EVERY_S = 10.0
CHECK_TIMEOUT_S = 60.0
"""A check that takes longer has lost a message: another may begin."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Checks:
    """The checks of one version on one node."""

    node: NodeTraining
    fence: int
    version: int
    num_done: int = 0
    begun_at_s: float = -inf
    """When the last one began."""
    task_id: str | None = None
    """The check that is under way; None: there is none."""
    trained: CheckScored | None = None
    """Its first half."""

    @property
    def are_current(self) -> bool:
        """Whether the node still serves that version, as far as is known.

        Where the newest weights serve, its stages may be a step apart while something trains or is merged.
        """
        node, published = self.node, self.node.work.publishing.published
        if published is not None:
            return (node.life.fence, published) == (self.fence, self.version)
        is_at_rest = node.work.is_idle and not node.work.is_waiting
        return is_at_rest and (node.life.fence, node.version) == (self.fence, self.version)


class WeightsChecks:
    """At most one check of each node at a time."""

    def __init__(self, card: ModelCard, *, name: str, bus: Bus, clock: Clock, outbox: Outbox) -> None:
        """`name`: where results come back to, as a gateway's id."""
        self._tokens = tokens_to_score(card.vocab_size, card.context_length)
        self._name = name
        self._bus = bus
        self._clock = clock
        self._outbox = outbox
        self._numbers = itertools.count()
        self._checks: dict[int, _Checks] = {}
        """The latest ones of each node."""
        self.differs: dict[int, str] = {}
        """By node that was checked: how what serves differs from what trains; empty: it does not."""
        self.num_skipped = 0
        """Checks that came to nothing: mostly because the node trained on meanwhile."""

    async def subscribe(self) -> None:
        """Listen for the results of requests."""
        await self._bus.subscribe(TOKENS.at(gateway=self._name), self._on_tokens)
        await self._bus.subscribe(FAILED.at(gateway=self._name), self._on_failed)

    def begin_if_due(self, node: NodeTraining) -> None:
        """Begin a check of the node if it is time."""
        before = self._checks.get(node.node)
        checks = _Checks(node, node.life.fence, node.version)
        if node.served_version != node.version or not checks.are_current:
            return
        is_new = before is None or (before.fence, before.version) != (checks.fence, checks.version)
        if before is not None and not is_new:
            checks = before
        if checks.num_done < NUM_CHECKS and not self._is_early(before, at_once=is_new and node.work.is_idle):
            self._begin(checks)

    def _is_early(self, before: _Checks | None, *, at_once: bool) -> bool:
        if before is None or at_once:
            return False
        pause_s = CHECK_EVERY_S if before.task_id is None else CHECK_TIMEOUT_S
        return self._clock.now_s() - before.begun_at_s < pause_s

    def _begin(self, checks: _Checks) -> None:
        before = self._checks.get(checks.node.node)
        if before is not None and before.task_id is not None:
            self._skip(before)
        self._checks[checks.node.node] = checks
        checks.begun_at_s, checks.task_id = self._clock.now_s(), f"{self._name}-{next(self._numbers)}"
        check = CheckForward(fence=checks.fence, version=checks.version, tokens=self._tokens)
        self._outbox.post(CHECK.at(node=checks.node.node, stage=0), check)

    def scored(self, report: StageReport, event: CheckScored) -> None:
        """Take the first half of a check: what trains."""
        checks = self._checks.get(report.node)
        if checks is None or checks.task_id is None or checks.trained is not None:
            return
        if (report.fence, event.version) != (checks.fence, checks.version):
            return
        if not event.logprobs or not checks.are_current:
            self._skip(checks)
            return
        checks.trained = event
        task = InferenceTask(
            task_id=checks.task_id,
            gateway=self._name,
            prompt=self._tokens,
            sampling=Sampling(max_tokens=0, num_logprobs=0),
            prompt_logprobs=True,
            timeout_s=CHECK_TIMEOUT_S,
            deferrable=True,
            weights_version=checks.node.work.publishing.published,
        )
        self._outbox.post(ASSIGN.at(node=report.node), task)

    async def _on_tokens(self, incoming: Incoming[TokensProduced]) -> None:
        produced, checks = incoming.message, self._checks.get(incoming.message.node)
        for result in produced.results:
            if checks is None or checks.trained is None or checks.task_id != result.task_id:
                continue
            trained = checks.trained
            is_of_version = produced.weights_version == checks.version and checks.are_current
            if not is_of_version or len(result.prompt) != len(trained.logprobs):
                self._skip(checks)
                continue
            difference = disagreement(trained.logprobs, result.prompt, trained.dtype)
            checks.task_id = checks.trained = None
            checks.num_done += 1
            self._note(produced.node, checks.version, difference)

    async def _on_failed(self, incoming: Incoming[TaskFailed]) -> None:
        for checks in self._checks.values():
            if checks.task_id == incoming.message.task_id:
                self._skip(checks)

    def _skip(self, checks: _Checks) -> None:
        checks.task_id = checks.trained = None
        self.num_skipped += 1

    def _note(self, node: int, version: int, difference: str) -> None:
        if difference:
            log.error("node %d: version %d is served with other weights: %s", node, version, difference)
            difference = f"version {version}: {difference}"
        self.differs[node] = difference
