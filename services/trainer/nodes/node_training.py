"""One node as the trainer drives it: events in, actions out. Reads no clock and sends nothing.

closed --all stages ready--> restoring --all hold the checkpoint--> open
  ^  ^                           |                                   |
  |  '--- a stage restarts, falls silent or fails: its batches are given back ----'
  '--- after a rollback, during which the node stays closed
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import inf, isfinite, sqrt
from typing import Literal

from services.trainer.nodes.decisions import (
    Action,
    Applied,
    Closed,
    Feed,
    Halted,
    Restore,
    RollBack,
    Skipped,
    Step,
    StepsAhead,
)
from services.trainer.nodes.members import Members
from services.trainer.nodes.placed_batches import FedBatch, PlacedBatches
from services.trainer.nodes.saves import NodeSaves
from services.trainer.publication.losses import Losses
from services.trainer.publication.publishing import Publishing, PublishingRules
from shared.messages.cluster import Heartbeat
from shared.messages.training import (
    BatchReady,
    BatchStepped,
    SaveFailed,
    ShardSaved,
    StageReport,
    TrainingFailed,
    VersionsServed,
)
from shared.schedule import Feeding, is_synchronous

STALLED_AFTER_S = 120.0
"""A node with work and without a report for so long has lost a message: it starts again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The rules for every node."""

    feeding: Feeding
    checkpoint_every: int
    checkpoint_idle_s: float
    checkpoint_idle_bytes_per_s: float = inf
    """Checkpoints for want of work are not written faster than that, in the mean."""
    microbatches: int = 1
    """Parts that a batch is cut into."""
    shares_weights: bool = False
    """Nodes are merged: when to save and when to restore is decided for all of them together."""
    shares_steps: bool = False
    """Gradients are averaged over the nodes: when to step is, too."""
    max_gradient_norm: float = inf
    """Gradients whose norm over all stages is larger are scaled down to it."""
    max_skips: int = 3
    """After so many batches in a row whose gradients are not finite the node trains no more."""
    publishing: PublishingRules = field(default_factory=PublishingRules)

    def num_filling(self, num_stages: int) -> int:
        """Batches that fill the pipeline: without a flush, one microbatch for each stage, and the extra."""
        if is_synchronous(self.feeding.schedule):
            return 1
        return -(-(num_stages + self.feeding.extra_in_flight) // self.microbatches)

    def max_fed(self, num_stages: int) -> int:
        """Batches at stage 0 that are not done: those that fill the pipeline, and the next one.

        Not that one where a merge may come before it, and nothing of it has to enter until then.
        """
        waits = self.shares_weights and self.feeding.flushes(num_stages)
        return self.num_filling(num_stages) + (not waits)


class NodeTraining:
    """State of one node. Each method takes what has happened and returns what to do, in order."""

    def __init__(
        self, node: int, num_stages: int, *, rules: Rules, durable_version: int, fences: Iterator[int]
    ) -> None:
        self.node = node
        self.phase: Literal["closed", "restoring", "open"] = "closed"
        self.fence = 0
        """A new one with every restore: what belongs to an earlier life of the node is known by it."""
        self.version = durable_version
        self.publishing = Publishing(rules.publishing)
        self._rules = rules
        self._fences = fences
        self._members = Members(num_stages)
        self._batches = PlacedBatches()
        self._num_skips = 0
        """Batches skipped since one was applied."""
        self.halt_reason = ""
        """Empty while it trains."""
        self._saves = NodeSaves(
            durable_version,
            every=None if rules.shares_weights else rules.checkpoint_every,
            idle_s=rules.checkpoint_idle_s,
            idle_bytes_per_s=rules.checkpoint_idle_bytes_per_s,
        )
        self._closing: Closed | None = None
        """Set while the node must close and a manifest is still being written."""
        self._rollback_to: int | None = None
        """Set from the order to roll back until it is done."""
        self._silent_since_s: float | None = None
        self.is_held = False
        """No further batch begins for now."""
        self._is_merging = False
        """Its stages are to hold merged weights, and have not all answered."""
        self._keeps_merged = False
        self._has_spoken = False
        """Since it closed: a restore that fails is tried again at the next heartbeat, and not before."""
        self.may_restore = not rules.shares_weights
        """Whether this is the time: a node that joins others must get the weights that they have."""

    @property
    def is_known(self) -> bool:
        """Whether batches may be placed here: they are fed at once, or when the restore is through."""
        return self.phase != "closed" and not self.is_halted

    @property
    def is_halted(self) -> bool:
        """Whether training here has stopped: no batch begins any more, until a restart or a rollback."""
        return bool(self.halt_reason)

    @property
    def is_quiet(self) -> bool:
        """Nothing trains here, and nothing is being saved."""
        return self.phase == "open" and not self._batches.fed and not self.is_saving

    @property
    def durable_version(self) -> int:
        """The version of the checkpoint that the node goes back to."""
        return self._saves.durable_version

    @property
    def served_version(self) -> int | None:
        """The version that answers requests; None while the trainer does not know it."""
        if self.phase != "open":
            return None
        published = self.publishing.published
        return self.version if published is None else published

    @property
    def is_saving(self) -> bool:
        return self._saves.is_saving

    @property
    def is_save_unanswered(self) -> bool:
        return self._saves.is_unanswered

    @property
    def wants_save(self) -> bool:
        """Whether the present version should be durable, because a guard lets it serve or may yet."""
        return self._wants_saved(self.version)

    @property
    def is_closing(self) -> bool:
        """Whether it is not yet known what this node has made durable."""
        return self._closing is not None

    @property
    def waits_to_join(self) -> bool:
        """All stages are there, and wait for the weights to hold."""
        return self._can_restore and self._has_spoken

    @property
    def _can_restore(self) -> bool:
        is_busy = self.is_closing or self.is_rolling_back
        return self.phase == "closed" and not is_busy and self._members.are_complete

    @property
    def complete(self) -> FedBatch | None:
        """The batch whose gradients every stage has, and whose step is not ordered."""
        return self._batches.complete if self.phase == "open" else None

    @property
    def squared_norm(self) -> float | None:
        """The squared norm of that batch's gradients; None without one."""
        return self.complete.squared_norm if self.complete else None

    @property
    def has_nothing_begun(self) -> bool:
        """No batch is on its way through the stages."""
        return not self._batches.fed

    @property
    def has_joint_step(self) -> bool:
        """Whether a step that is made with other nodes is not done here."""
        return any(batch.is_joint for batch in self._batches.fed)

    @property
    def is_idle(self) -> bool:
        """Open, and no batch is here."""
        return self.phase == "open" and self._batches.is_empty

    @property
    def is_rolling_back(self) -> bool:
        return self._rollback_to is not None

    @property
    def num_stages(self) -> int:
        return self._members.num_stages

    @property
    def num_unfinished(self) -> int:
        return len(self._batches.batch_ids)

    @property
    def num_wanted(self) -> int:
        """Batches that it can do with: those that fill its pipeline, and the next one."""
        return 1 + self._rules.num_filling(self.num_stages)

    def heartbeat(self, beat: Heartbeat, now_s: float) -> list[Action]:
        """A stage is alive."""
        actions = self._close(f"stage {beat.stage} was restarted") if self._members.is_restart(beat) else []
        self._members = self._members.after(beat, now_s)
        self._has_spoken = True
        return actions + self._restore_if_complete()

    def tick(self, now_s: float) -> list[Action]:
        """Time has passed."""
        if lost := self._members.lost(now_s):
            self._members = self._members.without(lost)
            return self._close(f"stages {lost} are silent")
        if self._is_stalled(now_s):
            return self._close(f"no report for {STALLED_AFTER_S:g} s") + self._restore_if_complete()
        if abandoned := self._saves.give_up_if_late(self.version, now_s):
            return abandoned + self._advance(now_s)
        is_empty = self._batches.is_empty or (self.is_halted and self.has_nothing_begun)
        is_idle = self.phase == "open" and is_empty
        saving = self._saves.request_if_idle(
            self.version, is_idle=is_idle, fence=self.fence, num_stages=self.num_stages, now_s=now_s
        )
        is_at_rest = is_idle and not (self.is_saving or self._is_merging)
        if is_at_rest and self.publishing.is_guarded and self.version == self.durable_version:
            return list(self.publishing.at_rest(self.version, now_s))
        return saving

    def messages_lost(self) -> list[Action]:
        """The connection was lost and is back: what is on its way may never be reported."""
        is_saving = self._saves.waits_for_stages
        is_waiting = bool(self._batches.fed) or is_saving or self._is_merging
        if self.phase == "restoring" or (self.phase == "open" and is_waiting):
            return (
                self._close("messages may have been lost with the connection") + self._restore_if_complete()
            )
        return []

    def place(self, batch_id: str, now_s: float) -> list[Action]:
        """A batch has been given to this node."""
        self._batches = self._batches.add(batch_id)
        return self._advance(now_s)

    def restored(
        self,
        fence: int,
        failure: str,
        now_s: float,
        *,
        served: int | None = None,
        rise: float = 1.0,
        is_judged: bool = True,
    ) -> list[Action]:
        """The stages hold the durable checkpoint, or do not (`failure` says why).

        `served`: the version that serves, None: that of the checkpoint; `rise`: see `Publishing.restored`;
        `is_judged`: a guard has evaluated the checkpoint's version.
        """
        if self.phase != "restoring" or fence != self.fence:
            return []
        if failure:
            # The next heartbeat that finds the node complete tries again.
            return self._close(f"the restore failed: {failure}")
        self.phase = "open"
        served = self.version if served is None else served
        newest_tried = self.version if is_judged else served
        restored = self.publishing.restored(served, rise=rise, newest_tried=newest_tried)
        return [*restored, *self._advance(now_s)]

    def report(self, report: StageReport, now_s: float) -> list[Action]:
        """Something happened on a stage; what belongs to an earlier life of the node is ignored."""
        if report.fence != self.fence or self.phase != "open":
            return []
        if isinstance(report.event, VersionsServed):
            return [*self.publishing.served(report.event), *self._advance(now_s)]
        self._silent_since_s = None
        stage = report.stage
        match report.event:
            case BatchReady(batch_id=batch_id, squared_norm=squared_norm):
                self._ready(batch_id, squared_norm)
            case BatchStepped():
                return self._stepped(report.event, now_s) + self._advance(now_s)
            case TrainingFailed(batch_id=batch_id, reason=reason) as failure:
                closed = self._close(
                    f"stage {stage} failed: {reason}",
                    failed=batch_id if failure.is_batch_at_fault else None,
                    unfit=batch_id if failure.lacks_memory else None,
                )
                return closed + self._restore_if_complete()
            case ShardSaved() | SaveFailed():
                self._saves.reported(stage, report.event)
                return self._saves.settle(self.version) + self._advance(now_s)
        return self._advance(now_s)

    def kept(self, fence: int, version: int, is_kept: bool) -> list[Action]:
        """Take the result of `Keep`."""
        return list(self.publishing.kept(version, is_kept)) if fence == self.fence else []

    def evaluated(self, fence: int, version: int, losses: Losses | None) -> list[Action]:
        """Take the result of `Evaluate`; None: the losses could not be found."""
        return list(self.publishing.evaluated(version, losses)) if fence == self.fence else []

    def save_answered(
        self, fence: int, version: int, refusals: Mapping[int, str], now_s: float
    ) -> list[Action]:
        """Every stage was asked to save `version`; `refusals` says which do not, and why."""
        if fence != self.fence or self._saves.version != version:
            return []
        self._saves.answered(refusals)
        return self._saves.settle(self.version) + self._advance(now_s)

    def checkpoint_written(self, version: int, failure: str, now_s: float) -> list[Action]:
        """The checkpoint is durable, or is not (`failure` says why)."""
        assert self._saves.version == version
        actions = self._saves.written(failure)
        if self._closing is not None:
            return actions + self._finish_closing(self._closing) + self._restore_if_complete()
        return actions + self._advance(now_s)

    # Together with other nodes

    def hold(self) -> None:
        """Let no further batch begin; what has begun goes on to its end."""
        self.is_held = True

    def release(self, now_s: float) -> list[Action]:
        self.is_held = False
        return self._advance(now_s)

    def allow_restore(self, durable_version: int) -> list[Action]:
        """The closed node may join; that is the version that all nodes' newest checkpoint holds."""
        self.may_restore, self.version = True, durable_version
        self._saves.adopt(durable_version)
        return self._restore_if_complete()

    def fail(self, reason: str) -> list[Action]:
        """Give everything back that is not durable, for what happened elsewhere."""
        return self._close(reason)

    def halt(self, reason: str) -> list[Action]:
        """Train no more: what has begun goes on to its end, the rest is for others."""
        not_begun = () if self.is_closing else self._batches.waiting  # else all is given back anyway
        self.halt_reason = reason
        self._batches = self._batches.without(not_begun)
        return [Halted(reason, not_begun)]

    def merge(self, version: int) -> bool:
        """The stages are asked to hold merged weights, of `version`; returns whether they keep them."""
        assert self.is_quiet
        self._is_merging = True
        # Not if a node that alone has learnt keeps that number already: requests are pinned to it.
        self._keeps_merged = self._begin_keeping(version, may_save=True)
        return self._keeps_merged

    def merged(self, version: int) -> list[Action]:
        """The stages hold merged weights."""
        assert self.is_quiet
        self.version, self._is_merging = version, False
        return list(self.publishing.applied(version)) if self._keeps_merged else []

    def adopt(self, durable_version: int) -> None:
        """Another node has written a checkpoint of just these weights."""
        self._saves.adopt(durable_version)

    def may_save(self, now_s: float, *, is_idle: bool = False) -> bool:
        """Whether it is time to: a full disk is not asked again at once. `is_idle`: for want of work."""
        return self._saves.may_request(now_s, is_idle=is_idle)

    def save(self, now_s: float) -> list[Action]:
        """Make the present version durable."""
        return self._saves.request(self.version, self.fence, self.num_stages, now_s)

    def skip(self, now_s: float) -> list[Action]:
        """Drop the complete batch, whose own gradients are not finite, before others are averaged with it."""
        return self._order(self.version, now_s)

    def join_step(self, name: str) -> str:
        """Let the averaged gradients take the place of this node's; returns its batch, empty without one."""
        batch = self._batches.complete
        self._batches = self._batches.join(batch.batch_id if batch else name)
        return batch.batch_id if batch else ""

    @property
    def has_joint_gradients(self) -> bool:
        """Whether every stage has the averaged ones."""
        return self._batches.complete is not None and self._batches.complete.is_joint

    def order_step(
        self, version: int, now_s: float, *, rate_of: tuple[str, ...], squared_norm: float, may_save: bool
    ) -> list[Action]:
        """Every node has the averaged gradients, whose norm one tells: all step to `version`, or skip.

        `may_save`: the version may be saved, by one of them.
        """
        return self._order(version, now_s, rate_of=rate_of, squared_norm=squared_norm, may_save=may_save)

    def roll_back(self, version: int) -> list[Action]:
        """The node must go back to an older durable checkpoint, for good."""
        assert self._rollback_to is None
        self._rollback_to = version
        if self.phase == "closed" and self._closing is None:
            return [RollBack(version, ())]
        return self._close(f"it goes back to version {version}")

    def rolled_back(self, failure: str) -> list[Action]:
        """The older checkpoint is the newest now; or nothing has changed, and `failure` says why."""
        assert self._rollback_to is not None
        version, self._rollback_to = self._rollback_to, None
        if failure:
            return [Closed(f"no rollback: {failure}", ()), *self._restore_if_complete()]
        self.version, self._num_skips, self.halt_reason = version, 0, ""
        self._saves.adopt(version)
        return self._restore_if_complete()

    def _ready(self, batch_id: str, squared_norm: float) -> None:
        """Stages wait for an order; one that was given ahead is on its way, and holds if all is finite."""
        batch = self._batches.find(batch_id)
        if batch is None:
            return
        if batch.version is not None:
            if isfinite(squared_norm):
                return
            self._batches = self._batches.revoke_from(batch_id)
            self.publishing.revoke_from(batch.version)
        self._batches = self._batches.ready(batch_id, squared_norm)

    def _stepped(self, event: BatchStepped, now_s: float) -> list[Action]:
        batch_id, loss = event.batch_id, event.loss
        batch = self._batches.find(batch_id)
        if batch is None:
            return []
        if event.version != batch.version:
            reason = f"the node is at version {event.version} after {batch_id}, not at {batch.version}"
            return self._close(reason) + self._restore_if_complete()
        self._batches = self._batches.stepped(batch_id)
        self.version = batch.version
        self._saves.reached(self.version, now_s)
        if batch.is_placeholder:
            return [] if batch.is_skipped else list(self.publishing.applied(self.version))
        if batch.is_skipped:
            return self._count_skip(Skipped(batch_id, loss))
        if not self.is_halted:
            self._num_skips = 0
        applied = Applied(batch_id, self.version, loss)
        return [applied, *self.publishing.applied(self.version), *self._saves.settle(self.version)]

    def _count_skip(self, skipped: Skipped) -> list[Action]:
        self._num_skips += 1
        if self._num_skips < self._rules.max_skips:
            return [skipped]
        reason = f"the gradients of {self._num_skips} batches in a row were not finite"
        return [skipped, *self.halt(reason)]

    def _advance(self, now_s: float) -> list[Action]:
        """Feed what there is room for, and order the steps that can be."""
        return [*self._feed(), *self._order_steps(now_s)]

    def _order_steps(self, now_s: float) -> list[Action]:
        actions: list[Action] = []
        while self.phase == "open" and (batch := self._batches.unordered) and not self._rules.shares_steps:
            if self.is_save_unanswered:
                break  # a stage must know that it has to save a version before it steps beyond it
            version = self._present_version + 1
            may_save = not (self._rules.shares_weights or self.is_saving)
            if batch.squared_norm is not None:
                actions += self._order(version, now_s, may_save=may_save)
            elif ordered := self._order_ahead(batch.batch_id, version, now_s, may_save=may_save):
                actions += ordered
            else:
                break
        return actions

    def _order_ahead(self, batch_id: str, version: int, now_s: float, *, may_save: bool) -> list[Action]:
        """Give the step ahead, and say whether that version is kept or saved; [] if this is known only later.

        A version that is not saved by its own node alone is not guarded, whenever it is decided.
        """
        is_kept = self._begin_keeping(version, may_save=may_save)
        is_merged_only = self._rules.shares_weights and self.publishing.is_guarded
        if not (is_kept or is_merged_only) and self.publishing.may_keep_later(version):
            return []
        self._batches = self._batches.order(batch_id, version)
        return [StepsAhead(batch_id, version, is_kept=is_kept), *self._save_if_due(version, now_s)]

    def _order(
        self,
        version: int,
        now_s: float,
        *,
        rate_of: tuple[str, ...] = (),
        squared_norm: float | None = None,
        may_save: bool = False,
    ) -> list[Action]:
        """Step on the complete batch, to `version`; skip it when its gradients are not finite.

        `squared_norm`: of them, where nodes must not differ; None: what the stages here have found.
        `may_save`: a checkpoint of that version may be made.
        """
        batch = self._batches.complete
        assert batch is not None and batch.squared_norm is not None
        squared_norm = batch.squared_norm if squared_norm is None else squared_norm
        step = replace(self._step_of(batch.batch_id, squared_norm, version, may_save), rate_of=rate_of)
        self._batches = self._batches.order(step.batch_id, step.version, is_skipped=step.is_skipped)
        return [step, *self._save_if_due(step.version, now_s)]

    def _save_if_due(self, version: int, now_s: float) -> list[Action]:
        """A step to that version is ordered."""
        is_wanted = self._wants_saved(version)
        return self._saves.request_if_due(version, self.fence, self.num_stages, now_s, is_wanted=is_wanted)

    def _begin_keeping(self, version: int, *, may_save: bool) -> bool:
        """Returns whether stages shall keep that version. A guard waits for one that is saved, too."""
        return (may_save or not self.publishing.is_guarded) and self.publishing.begin_keeping(version)

    def _wants_saved(self, version: int) -> bool:
        return version != self.durable_version and self.publishing.wants_saved(version)

    @property
    def _present_version(self) -> int:
        """The version of the weights when all ordered steps are done."""
        ordered = self._batches.ordered_version
        return self.version if ordered is None else ordered

    def _step_of(self, batch_id: str, squared_norm: float, version: int, may_save: bool) -> Step:
        if not isfinite(squared_norm):
            return Step(batch_id, self._present_version, is_skipped=True)
        norm, limit = sqrt(squared_norm), self._rules.max_gradient_norm
        return Step(
            batch_id,
            version,
            gradient_scale=limit / norm if norm > limit else 1.0,
            is_kept=self._begin_keeping(version, may_save=may_save),
        )

    def _feed(self) -> list[Action]:
        actions: list[Action] = []
        while (
            self.phase == "open"
            and self._batches.waiting
            and not (self.is_held or self.is_halted)
            and len(self._batches.fed) < self._rules.max_fed(self.num_stages)
        ):
            actions.append(Feed(self._batches.waiting[0]))
            self._batches = self._batches.feed()
        return actions

    def _is_stalled(self, now_s: float) -> bool:
        if self.phase != "open" or not self._batches.fed:
            self._silent_since_s = None
        elif self._silent_since_s is None:
            self._silent_since_s = now_s
        return self._silent_since_s is not None and now_s - self._silent_since_s > STALLED_AFTER_S

    def _close(self, reason: str, *, failed: str | None = None, unfit: str | None = None) -> list[Action]:
        if self.phase == "closed":
            return []
        self.phase, self.is_held, self._is_merging, self._has_spoken = "closed", False, False, False
        closed = Closed(reason, self._batches.batch_ids, failed, unfit)
        if self._saves.is_writing:
            # Whether its batches are durable is only known when the manifest is written.
            self._closing = closed
            return []
        return self._finish_closing(closed)

    def _finish_closing(self, closed: Closed) -> list[Action]:
        abandoned = self._saves.closed(closed.reason)
        self._closing = None
        self.publishing.closed()
        self._batches = PlacedBatches()
        self.version = self.durable_version
        if self._rollback_to is not None:
            return [*abandoned, RollBack(self._rollback_to, closed.unfinished)]
        return [*abandoned, closed]

    def _restore_if_complete(self) -> list[Action]:
        if not (self._can_restore and self.may_restore):
            return []
        self.phase, self.may_restore = "restoring", not self._rules.shares_weights
        self.fence = next(self._fences)
        self._batches = PlacedBatches()
        return [Restore(self.fence, self._members.num_stages)]
