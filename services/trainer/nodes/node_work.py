"""A node's work while it is open: batches, saves and published versions. Pure: events in, actions out."""

from collections.abc import Mapping

from services.trainer.nodes.batch_gate import BatchGate
from services.trainer.nodes.batch_steps import BatchSteps
from services.trainer.nodes.decisions import Action, Applied, Halted, Skipped
from services.trainer.nodes.rules import Rules
from services.trainer.nodes.save_schedule import SaveSchedule
from services.trainer.nodes.saves import NodeSaves
from services.trainer.nodes.weights_merge import WeightsMerge
from services.trainer.publication.publishing import Publishing
from shared.messages.training import BatchStepped


class NodeWork:
    """Batches are placed from the restore on; they are fed, and their steps ordered, while it is open."""

    def __init__(self, durable_version: int, *, rules: Rules) -> None:
        self.publishing = Publishing(rules.publishing)
        self.saves = NodeSaves(
            durable_version,
            SaveSchedule(
                every=None if rules.shares_weights else rules.checkpoint_every,
                idle_s=rules.checkpoint_idle_s,
                bytes_per_s=rules.checkpoint_bytes_per_s,
            ),
        )
        self.steps = BatchSteps(durable_version, rules=rules, saves=self.saves, publishing=self.publishing)
        self.merge = WeightsMerge(self.steps, self.publishing)
        self.gate = BatchGate(max_skips=rules.max_skips)
        self.is_open = False
        self._rules = rules
        self._num_stages = 0

    @property
    def is_idle(self) -> bool:
        """Open, and no batch is here."""
        return self.is_open and self.steps.placed.is_empty

    @property
    def is_quiet(self) -> bool:
        """Nothing trains here, and nothing is being saved."""
        return self.is_open and self.steps.has_nothing_begun and not self.saves.is_saving

    @property
    def is_waiting(self) -> bool:
        """Whether stages are yet to report something."""
        return bool(self.steps.placed.fed) or self.saves.waits_for_stages or self.merge.is_under_way

    @property
    def num_wanted(self) -> int:
        """Batches that it can do with: those that fill its pipeline, and the next one."""
        return 1 + self._rules.num_filling(self._num_stages)

    def begin(self, fence: int, num_stages: int) -> None:
        """Let batches be placed: the node is being restored."""
        self._num_stages = num_stages
        self.saves.begin(fence, num_stages)
        self.steps.reset(self.steps.version)

    def open(self, now_s: float) -> list[Action]:
        """Start: every stage holds the durable checkpoint."""
        self.is_open = True
        return self.advance(now_s)

    def close(self) -> tuple[str, ...]:
        """Let nothing begin any more; returns the batches that were placed here and are not applied."""
        self.is_open = self.gate.is_paused = False
        self.merge.cancel()
        return self.steps.placed.batch_ids

    def forget(self, reason: str) -> list[Action]:
        """Give up whatever is not durable."""
        abandoned = self.saves.closed(reason)
        self.publishing.closed()
        self.steps.reset(self.saves.durable_version)
        return abandoned

    def adopt(self, durable_version: int) -> None:
        """Go on from another checkpoint; the node is closed."""
        self.saves.adopt(durable_version)
        self.steps.reset(durable_version)

    def place(self, batch_id: str, now_s: float) -> list[Action]:
        """A batch has been given to this node."""
        self.steps.place(batch_id)
        return self.advance(now_s)

    def advance(self, now_s: float) -> list[Action]:
        """Feed what there is room for, and order the steps that can be."""
        if not self.is_open:
            return []
        fed = self.steps.feed(self._num_stages) if self.gate.is_open else []
        return [*fed, *self.steps.order_all(now_s)]

    def tick(self, now_s: float) -> list[Action]:
        """Time has passed on the open node."""
        if abandoned := self.saves.give_up_if_late(self.steps.version, now_s):
            return abandoned + self.advance(now_s)
        is_idle = self.steps.placed.is_empty or (bool(self.gate.halt_reason) and self.steps.has_nothing_begun)
        version = self.steps.version
        saving = self.saves.request_if_idle(version, is_idle=is_idle, now_s=now_s)
        is_at_rest = is_idle and not (self.saves.is_saving or self.merge.is_under_way)
        if is_at_rest and self.publishing.is_guarded and version == self.saves.durable_version:
            return list(self.publishing.at_rest(version, now_s))
        return saving

    def stepped(self, event: BatchStepped, now_s: float) -> list[Action]:
        """All stages have stepped as ordered, or skipped the batch."""
        batch = self.steps.placed.find(event.batch_id)
        if batch is None:
            return []
        self.steps.stepped(batch, now_s)
        version = self.steps.version
        if batch.is_placeholder:
            return [] if batch.is_skipped else list(self.publishing.applied(version))
        if batch.is_skipped:
            skipped, reason = Skipped(batch.batch_id, event.loss), self.gate.skipped()
            return [skipped, *(self.halt(reason) if reason else [])]
        self.gate.applied()
        applied = Applied(batch.batch_id, version, event.loss)
        return [applied, *self.publishing.applied(version), *self.saves.settle(version)]

    def save(self, now_s: float) -> list[Action]:
        """Make the present version durable."""
        return self.saves.request(self.steps.version, now_s)

    def save_answered(self, version: int, refusals: Mapping[int, str], now_s: float) -> list[Action]:
        """Every stage was asked to save `version`; `refusals` says which do not, and why."""
        if self.saves.version != version:
            return []
        self.saves.answered(refusals)
        return self.settle(now_s)

    def settle(self, now_s: float) -> list[Action]:
        """Stages have answered, or written their share of a checkpoint, or failed to."""
        return self.saves.settle(self.steps.version) + self.advance(now_s)

    def halt(self, reason: str) -> list[Action]:
        """Train no more: what has begun goes on to its end, the rest is for others."""
        not_begun = self.steps.placed.waiting
        self.gate.halt_reason = reason
        self.steps.placed = self.steps.placed.without(not_begun)
        return [Halted(reason, not_begun)]

    def pause(self) -> None:
        """Let no further batch begin; what has begun goes on to its end."""
        self.gate.is_paused = True

    def resume(self, now_s: float) -> list[Action]:
        """Let batches begin again."""
        self.gate.is_paused = False
        return self.advance(now_s)
