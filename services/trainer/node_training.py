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

from services.trainer.members import Members
from services.trainer.publishing import Publishing, PublishingAction, PublishingRules
from services.trainer.saves import Save
from services.trainer.schedules import OpenBatch, Pipeline, Schedule, Shape, Slot
from shared.messages.cluster import Heartbeat
from shared.messages.training import (
    BackwardDone,
    ForwardDone,
    GradientsReady,
    SaveFailed,
    ShardSaved,
    StageReport,
    StepDone,
    TrainingFailed,
    VersionsServed,
)

STALLED_AFTER_S = 120.0
"""A node with work and without a report for so long has lost a message: it starts again."""
SAVE_DEADLINE_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds for every node."""

    schedule: Schedule
    checkpoint_every: int
    checkpoint_idle_s: float
    extra_in_flight: int = 0
    """Of microbatches, without a flush: see `Pipeline`."""
    shares_weights: bool = False
    """Nodes are merged: when to save and when to restore is decided for all of them together."""
    shares_steps: bool = False
    """Gradients are averaged over the nodes: when to step is, too."""
    max_gradient_norm: float = inf
    """Gradients whose norm over all stages is larger are scaled down to it."""
    max_skips: int = 3
    """After so many batches in a row whose gradients are not finite the node trains no more."""
    publishing: PublishingRules = field(default_factory=PublishingRules)


@dataclass(frozen=True, slots=True)
class Feed:
    """Send this microbatch to stage 0."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Step:
    """Order every stage to step on a batch, or to skip it."""

    batch_id: str
    version: int
    """Of the weights afterwards."""
    gradient_scale: float = 1.0
    is_skipped: bool = False
    rate_of: str = ""
    """The batch whose place in the stream sets the learning rate, when it is not this one: nodes that step
    together step alike."""
    is_kept: bool = False
    """Stages hold on to the version, to serve it."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """No stage's weights contain the batch, nor ever will: its gradients were not finite."""

    batch_id: str
    loss: float


@dataclass(frozen=True, slots=True)
class Halted:
    """The node trains no more, and goes on serving."""

    reason: str


@dataclass(frozen=True, slots=True)
class Applied:
    """All stages' weights contain the batch."""

    batch_id: str
    version: int
    loss: float


@dataclass(frozen=True, slots=True)
class Restore:
    """Have every stage hold the node's durable checkpoint; answer with `restored`."""

    epoch: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class RequestSave:
    """Ask every stage for its share of a checkpoint; answer with `save_answered`."""

    epoch: int
    version: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class WriteCheckpoint:
    """Make the shards a durable checkpoint; answer with `checkpoint_written`."""

    version: int
    num_stages: int
    shards: Mapping[int, ShardSaved]


@dataclass(frozen=True, slots=True)
class SaveAbandoned:
    """There will be no checkpoint of `version` now."""

    version: int
    reason: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The node is fed no more: what is not durable there must be run again."""

    reason: str
    unfinished: tuple[str, ...]
    """Batches that were placed here and not applied, in order."""
    failed: str | None = None
    """The batch whose own fault it seems to be."""
    unfit: str | None = None
    """The batch that found no memory."""


@dataclass(frozen=True, slots=True)
class RollBack:
    """Make an older durable checkpoint the node's newest, and discard what later ones contain; answer with
    `rolled_back`."""

    version: int
    unfinished: tuple[str, ...]
    """Batches that were placed here and not applied, in order: they must be run again."""


Action = (
    Feed
    | Step
    | Applied
    | Skipped
    | Halted
    | Restore
    | RequestSave
    | WriteCheckpoint
    | SaveAbandoned
    | Closed
    | RollBack
    | PublishingAction
)


class NodeTraining:
    """State of one node. Each method takes what has happened and returns what to do, in order."""

    def __init__(
        self, node: int, num_stages: int, *, rules: Rules, durable_version: int, epochs: Iterator[int]
    ) -> None:
        self.node = node
        self.phase: Literal["closed", "restoring", "open"] = "closed"
        self.epoch = 0
        """A new one with every restore: what belongs to an earlier life of the node is known by it."""
        self.version = durable_version
        self.durable_version = durable_version
        self.publishing = Publishing(rules.publishing)
        self._rules = rules
        self._epochs = epochs
        self._members = Members(num_stages)
        self._pipeline = self._empty_pipeline()
        self._losses: dict[str, float] = {}
        self._num_skips = 0
        """Batches skipped since one was applied."""
        self._save: Save | None = None
        self._closing: Closed | None = None
        """Set while the node must close and a manifest is still being written."""
        self._rollback_to: int | None = None
        """Set from the order to roll back until it is done."""
        self._save_from_version = 0
        """After a failed checkpoint, the next occasion."""
        self._idle_since_s: float | None = None
        self._silent_since_s: float | None = None
        self.is_held = False
        """No further batch begins for now."""
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
        """Whether training here has stopped for good: nothing enters any more."""
        return self._num_skips >= self._rules.max_skips

    @property
    def is_quiet(self) -> bool:
        """Nothing trains here, and nothing is being saved."""
        return self.phase == "open" and not self._pipeline.open_batches and self._save is None

    @property
    def is_saving(self) -> bool:
        return self._save is not None

    @property
    def is_save_unanswered(self) -> bool:
        return self._save is not None and not self._save.answered

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
    def complete(self) -> OpenBatch | None:
        """The batch whose gradients every stage has, and whose step is not ordered."""
        return self._pipeline.complete if self.phase == "open" else None

    @property
    def has_nothing_begun(self) -> bool:
        """No batch is on its way through the stages."""
        return not self._pipeline.open_batches

    @property
    def has_joint_step(self) -> bool:
        """Whether a step that is made with other nodes is not done here."""
        return any(batch.is_joint for batch in self._pipeline.open_batches)

    @property
    def is_idle(self) -> bool:
        """Open, and no batch is here."""
        return self.phase == "open" and self._pipeline.is_empty

    @property
    def is_rolling_back(self) -> bool:
        return self._rollback_to is not None

    @property
    def num_stages(self) -> int:
        return self._members.num_stages

    @property
    def num_unfinished(self) -> int:
        return len(self._pipeline.batch_ids)

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
        if self._save and not self._save.writing and now_s - self._save.requested_s > SAVE_DEADLINE_S:
            return self._abandon_save(f"not written within {SAVE_DEADLINE_S:g} s") + self._advance(now_s)
        return self._save_if_idle(now_s)

    def place(self, shape: Shape, now_s: float) -> list[Action]:
        """A batch has been given to this node."""
        self._pipeline = self._pipeline.add(shape)
        return self._advance(now_s)

    def restored(self, epoch: int, failure: str, now_s: float) -> list[Action]:
        """The stages hold the durable checkpoint, or do not (`failure` says why)."""
        if self.phase != "restoring" or epoch != self.epoch:
            return []
        if failure:
            # The next heartbeat that finds the node complete tries again.
            return self._close(f"the restore failed: {failure}")
        self.phase = "open"
        return [*self.publishing.restored(self.version), *self._advance(now_s)]

    def report(self, report: StageReport, now_s: float) -> list[Action]:
        """Something happened on a stage; what belongs to an earlier life of the node is ignored."""
        if report.epoch != self.epoch or self.phase != "open":
            return []
        if isinstance(report.event, VersionsServed):
            return list(self.publishing.served(report.event))
        self._silent_since_s = None
        stage = report.stage
        match report.event:
            case ForwardDone(batch_id=batch_id, index=index):
                self._pipeline = self._pipeline.forward_done(stage, batch_id, index)
            case BackwardDone():
                self._backward_done(stage, report.event)
            case GradientsReady(batch_id=batch_id, squared_norm=squared_norm):
                self._pipeline = self._pipeline.gradients_ready(stage, batch_id, squared_norm)
            case StepDone():
                return self._step_done(stage, report.event) + self._advance(now_s)
            case TrainingFailed(batch_id=batch_id, reason=reason) as failure:
                closed = self._close(
                    f"stage {stage} failed: {reason}",
                    failed=batch_id if failure.is_batch_at_fault else None,
                    unfit=batch_id if failure.lacks_memory else None,
                )
                return closed + self._restore_if_complete()
            case ShardSaved() | SaveFailed():
                self._shard_reported(stage, report.event)
                return self._settle_save() + self._advance(now_s)
        return self._advance(now_s)

    def evaluated(self, epoch: int, version: int, loss: float | None) -> list[Action]:
        """What `Evaluate` has asked for; None: the loss could not be found."""
        return list(self.publishing.evaluated(version, loss)) if epoch == self.epoch else []

    def save_answered(
        self, epoch: int, version: int, refusals: Mapping[int, str], now_s: float
    ) -> list[Action]:
        """Every stage was asked to save `version`; `refusals` says which do not, and why."""
        if epoch != self.epoch or self._save is None or self._save.version != version:
            return []
        self._save = self._save.with_answers(refusals)
        return self._settle_save() + self._advance(now_s)

    def checkpoint_written(self, version: int, failure: str, now_s: float) -> list[Action]:
        """The checkpoint is durable, or is not (`failure` says why)."""
        assert self._save is not None and self._save.version == version
        if failure:
            actions = self._abandon_save(failure)
        else:
            actions, self._save, self.durable_version = [], None, version
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
        self.may_restore, self.version, self.durable_version = True, durable_version, durable_version
        return self._restore_if_complete()

    def fail(self, reason: str) -> list[Action]:
        """Give everything back that is not durable, for what happened elsewhere."""
        return self._close(reason)

    def merged(self, version: int) -> None:
        """The stages hold merged weights."""
        assert self.is_quiet
        self.version = version

    def adopt(self, durable_version: int) -> None:
        """Another node has written a checkpoint of just these weights."""
        self.durable_version = durable_version

    def save(self, now_s: float) -> list[Action]:
        """Make the present version durable."""
        return self._request_save(self.version, now_s)

    def skip(self, now_s: float) -> list[Action]:
        """Drop the complete batch, whose own gradients are not finite, before others are averaged with it."""
        return self._order(self.version, now_s)

    def join_step(self, name: str) -> str:
        """Let the averaged gradients take the place of this node's; returns its batch, empty without one."""
        batch = self._pipeline.complete
        self._pipeline = self._pipeline.join(batch.batch_id if batch else name)
        return batch.batch_id if batch else ""

    @property
    def has_joint_gradients(self) -> bool:
        """Whether every stage has the averaged ones."""
        return self._pipeline.complete is not None and self._pipeline.complete.is_joint

    def order_step(self, version: int, now_s: float, *, rate_of: str) -> list[Action]:
        """Every node has the averaged gradients: all step to `version`, or skip."""
        return self._order(version, now_s, rate_of=rate_of)

    def roll_back(self, version: int) -> list[Action]:
        """The node must go back to an older durable checkpoint, for good."""
        assert self._rollback_to is None and version <= self.durable_version
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
        self.version = self.durable_version = version
        self._num_skips = 0
        return self._restore_if_complete()

    def _backward_done(self, stage: int, event: BackwardDone) -> None:
        self._pipeline = self._pipeline.backward_done(stage, event.batch_id, event.index)
        if event.loss is not None:
            self._losses[event.batch_id] = self._losses.get(event.batch_id, 0.0) + event.loss

    def _step_done(self, stage: int, event: StepDone) -> list[Action]:
        batch_id = event.batch_id
        batch = self._pipeline.open_batch(batch_id)
        if batch is None:
            return []
        if event.version != batch.version:
            reason = f"stage {stage} is at version {event.version} after {batch_id}, not at {batch.version}"
            return self._close(reason) + self._restore_if_complete()
        self._pipeline = self._pipeline.step_done(stage, batch_id)
        if self._pipeline.open_batch(batch_id) is not None:
            return []
        self.version = batch.version
        loss = self._losses.pop(batch_id, 0.0)
        if batch.is_placeholder:
            return [] if batch.is_skipped else list(self.publishing.applied(self.version))
        if batch.is_skipped:
            return self._count_skip(Skipped(batch_id, loss))
        if not self.is_halted:
            self._num_skips = 0
        applied = Applied(batch_id, self.version, loss)
        return [applied, *self.publishing.applied(self.version), *self._settle_save()]

    def _count_skip(self, skipped: Skipped) -> list[Action]:
        self._num_skips += 1
        if not self.is_halted:
            return [skipped]
        return [skipped, Halted(f"the gradients of {self._num_skips} batches in a row were not finite")]

    def _advance(self, now_s: float) -> list[Action]:
        """Order the steps that can be, and feed what may enter now."""
        return [*self._order_steps(now_s), *self._feed()]

    def _order_steps(self, now_s: float) -> list[Action]:
        actions: list[Action] = []
        while self.phase == "open" and self._pipeline.complete and not self._rules.shares_steps:
            if self.is_save_unanswered:
                break  # a stage must know that it has to save a version before it steps beyond it
            actions += self._order(self._present_version + 1, now_s)
        return actions

    def _order(self, version: int, now_s: float, *, rate_of: str = "") -> list[Action]:
        """Step on the complete batch, to `version`; skip it when its gradients are not finite."""
        batch = self._pipeline.complete
        assert batch is not None
        step = replace(self._step_of(batch, version), rate_of=rate_of)
        self._pipeline = self._pipeline.order(step.batch_id, step.version, is_skipped=step.is_skipped)
        return [step, *self._request_save_if_due(step.version, now_s)]

    @property
    def _present_version(self) -> int:
        """Of the weights when all that is ordered is done."""
        ordered = self._pipeline.ordered_version
        return self.version if ordered is None else ordered

    def _step_of(self, batch: OpenBatch, version: int) -> Step:
        if not isfinite(batch.squared_norm):
            return Step(batch.batch_id, self._present_version, is_skipped=True)
        norm, limit = sqrt(batch.squared_norm), self._rules.max_gradient_norm
        return Step(
            batch.batch_id,
            version,
            gradient_scale=limit / norm if norm > limit else 1.0,
            is_kept=self.publishing.keeps(version),
        )

    def _feed(self) -> list[Action]:
        actions: list[Action] = []
        while (
            self.phase == "open"
            and not self.is_halted
            and (slot := self._pipeline.upcoming)
            and not (self.is_held and slot.index == 0)
            and self._rules.schedule(self._pipeline)
        ):
            self._pipeline = self._pipeline.feed()
            actions.append(Feed(slot))
        return actions

    def _request_save_if_due(self, version: int, now_s: float) -> list[Action]:
        due = (
            version - self.durable_version >= self._rules.checkpoint_every and not self._rules.shares_weights
        )
        if self._save is not None or not due or version < self._save_from_version:
            return []
        return self._request_save(version, now_s)

    def _save_if_idle(self, now_s: float) -> list[Action]:
        is_empty = self._pipeline.is_empty or (self.is_halted and not self._pipeline.open_batches)
        idle = self.phase == "open" and is_empty and self._save is None and not self._rules.shares_weights
        if not idle or self.version == self.durable_version:
            self._idle_since_s = None
        elif self._idle_since_s is None:
            self._idle_since_s = now_s
        elif now_s - self._idle_since_s >= self._rules.checkpoint_idle_s:
            self._idle_since_s = None
            return self._request_save(self.version, now_s)
        return []

    def _request_save(self, version: int, now_s: float) -> list[Action]:
        self._save = Save(version, self._members.num_stages, now_s)
        return [RequestSave(self.epoch, version, self._members.num_stages)]

    def _shard_reported(self, stage: int, event: ShardSaved | SaveFailed) -> None:
        if self._save is None or self._save.version != event.version:
            return
        match event:
            case ShardSaved():
                self._save = self._save.with_shard(stage, event)
            case SaveFailed(reason=reason):
                self._save = self._save.with_failure(stage, reason)

    def _settle_save(self) -> list[Action]:
        save = self._save
        if save is None or save.writing or not save.is_settled:
            return []
        if save.failure:
            return self._abandon_save(save.failure)
        if self.version < save.version:
            return []  # another stage's StepDone is still on its way
        self._save = replace(save, writing=True)
        return [WriteCheckpoint(save.version, save.num_stages, save.shards)]

    def _abandon_save(self, reason: str) -> list[Action]:
        assert self._save is not None
        version, self._save = self._save.version, None
        self._save_from_version = version + 1
        return [SaveAbandoned(version, reason)]

    def _empty_pipeline(self) -> Pipeline:
        return Pipeline(self._members.num_stages, self._rules.extra_in_flight)

    def _is_stalled(self, now_s: float) -> bool:
        if self.phase != "open" or not self._pipeline.open_batches:
            self._silent_since_s = None
        elif self._silent_since_s is None:
            self._silent_since_s = now_s
        return self._silent_since_s is not None and now_s - self._silent_since_s > STALLED_AFTER_S

    def _close(self, reason: str, *, failed: str | None = None, unfit: str | None = None) -> list[Action]:
        if self.phase == "closed":
            return []
        self.phase, self.is_held, self._has_spoken = "closed", False, False
        closed = Closed(reason, self._pipeline.batch_ids, failed, unfit)
        if self._save is not None and self._save.writing:
            # Whether its batches are durable is only known when the manifest is written.
            self._closing = closed
            return []
        return self._finish_closing(closed)

    def _finish_closing(self, closed: Closed) -> list[Action]:
        abandoned = self._abandon_save(closed.reason) if self._save is not None else []
        self._closing = None
        self.publishing.closed()
        self._pipeline = self._empty_pipeline()
        self._losses.clear()
        self.version = self.durable_version
        self._save_from_version = 0
        if self._rollback_to is not None:
            return [*abandoned, RollBack(self._rollback_to, closed.unfinished)]
        return [*abandoned, closed]

    def _restore_if_complete(self) -> list[Action]:
        if not (self._can_restore and self.may_restore):
            return []
        self.phase, self.may_restore = "restoring", not self._rules.shares_weights
        self.epoch = next(self._epochs)
        self._pipeline = self._empty_pipeline()
        return [Restore(self.epoch, self._members.num_stages)]
