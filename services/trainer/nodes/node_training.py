"""One node as the trainer drives it: events in, actions out. Reads no clock and sends nothing.

closed --all stages ready--> restoring --all hold the checkpoint--> open
  ^  ^                           |                                   |
  |  '--- a stage restarts, falls silent or fails: its batches are given back ----'
  '--- after a rollback, during which the node stays closed
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from services.trainer.nodes.decisions import Action, Closed, Halted, Restore, RollBack
from services.trainer.nodes.members import Members
from services.trainer.nodes.node_work import STALLED_AFTER_S, NodeWork
from services.trainer.nodes.rules import Rules
from services.trainer.publication.losses import Losses
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


class NodeTraining:
    """A node's life. Each method takes what has happened and returns what to do, in order."""

    def __init__(
        self, node: int, num_stages: int, *, rules: Rules, durable_version: int, fences: Iterator[int]
    ) -> None:
        self.node = node
        self.phase: Literal["closed", "restoring", "open"] = "closed"
        self.fence = 0
        """A new one with every restore: what belongs to an earlier life of the node is known by it."""
        self.work = NodeWork(durable_version, rules=rules)
        self._members = Members(num_stages)
        self._fences = fences
        self._closing: Closed | None = None
        """Set while the node must close and a manifest is still being written."""
        self._rollback_to: int | None = None
        """Set from the order to roll back until it is done."""
        self._has_spoken = False
        """Since it closed: a restore that fails is tried again at the next heartbeat, and not before."""
        self._joins_others = rules.shares_weights
        self._may_restore = not self._joins_others
        """Whether this is the time: a node that joins others must get the weights that they have."""

    @property
    def version(self) -> int:
        """The steps that its weights contain."""
        return self.work.steps.version

    @property
    def durable_version(self) -> int:
        """The version of the checkpoint that the node goes back to."""
        return self.work.saves.durable_version

    @property
    def served_version(self) -> int | None:
        """The version that answers requests; None while the trainer does not know it."""
        if self.phase != "open":
            return None
        published = self.work.publishing.published
        return self.version if published is None else published

    @property
    def num_stages(self) -> int:
        return self._members.num_stages

    @property
    def is_known(self) -> bool:
        """Whether batches may be placed here: they are fed at once, or when the restore is through."""
        return self.phase != "closed" and not self.work.halt_reason

    @property
    def is_closing(self) -> bool:
        """Whether it is not yet known what this node has made durable."""
        return self._closing is not None

    @property
    def is_rolling_back(self) -> bool:
        return self._rollback_to is not None

    @property
    def waits_to_join(self) -> bool:
        """All stages are there, and wait for the weights to hold."""
        return self._can_restore and self._has_spoken

    def heartbeat(self, beat: Heartbeat, now_s: float) -> list[Action]:
        """A stage is alive."""
        actions = self.close(f"stage {beat.stage} was restarted") if self._members.is_restart(beat) else []
        self._members = self._members.after(beat, now_s)
        self._has_spoken = True
        return actions + self._restore_if_complete()

    def tick(self, now_s: float) -> list[Action]:
        """Time has passed."""
        if lost := self._members.lost(now_s):
            self._members = self._members.without(lost)
            return self.close(f"stages {lost} are silent")
        if self.work.is_stalled(now_s):
            return self.close(f"no report for {STALLED_AFTER_S:g} s") + self._restore_if_complete()
        return self.work.tick(now_s) if self.phase == "open" else []

    def messages_lost(self) -> list[Action]:
        """The connection was lost and is back: what is on its way may never be reported."""
        if self.phase == "restoring" or (self.phase == "open" and self.work.is_waiting):
            closed = self.close("messages may have been lost with the connection")
            return closed + self._restore_if_complete()
        return []

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
            return self.close(f"the restore failed: {failure}")
        self.phase = "open"
        served = self.version if served is None else served
        newest_tried = self.version if is_judged else served
        restored = self.work.publishing.restored(served, rise=rise, newest_tried=newest_tried)
        return [*restored, *self.work.open(now_s)]

    def report(self, report: StageReport, now_s: float) -> list[Action]:
        """Something happened on a stage; what belongs to an earlier life of the node is ignored."""
        if report.fence != self.fence or self.phase != "open":
            return []
        work = self.work
        if isinstance(report.event, VersionsServed):
            return [*work.publishing.served(report.event), *work.advance(now_s)]
        work.heard()
        match report.event:
            case BatchReady(batch_id=batch_id, squared_norm=squared_norm):
                work.steps.ready(batch_id, squared_norm)
            case BatchStepped():
                return self._stepped(report.event, now_s)
            case TrainingFailed():
                return self._failed(report.stage, report.event)
            case ShardSaved() | SaveFailed():
                work.saves.reported(report.stage, report.event)
                return work.settle(now_s)
        return work.advance(now_s)

    def kept(self, fence: int, version: int, is_kept: bool) -> list[Action]:
        """Take the result of `Keep`."""
        return list(self.work.publishing.kept(version, is_kept)) if fence == self.fence else []

    def evaluated(self, fence: int, version: int, losses: Losses | None) -> list[Action]:
        """Take the result of `Evaluate`; None: the losses could not be found."""
        return list(self.work.publishing.evaluated(version, losses)) if fence == self.fence else []

    def save_answered(
        self, fence: int, version: int, refusals: Mapping[int, str], now_s: float
    ) -> list[Action]:
        """Every stage was asked to save `version`; `refusals` says which do not, and why."""
        return self.work.save_answered(version, refusals, now_s) if fence == self.fence else []

    def checkpoint_written(self, version: int, failure: str, now_s: float) -> list[Action]:
        """The checkpoint is durable, or is not (`failure` says why)."""
        assert self.work.saves.version == version
        actions = self.work.saves.written(failure)
        if self._closing is not None:
            return actions + self._finish_closing(self._closing) + self._restore_if_complete()
        return actions + self.work.advance(now_s)

    def allow_restore(self, durable_version: int) -> list[Action]:
        """The closed node may join; that is the version that all nodes' newest checkpoint holds."""
        self._may_restore = True
        self.work.adopt(durable_version)
        return self._restore_if_complete()

    def halt(self, reason: str) -> list[Action]:
        """Train no more: what has begun goes on to its end, the rest is for others."""
        if self.is_closing:  # then all is given back anyway
            self.work.halt_reason = reason
            return [Halted(reason)]
        return self.work.halt(reason)

    def roll_back(self, version: int) -> list[Action]:
        """The node must go back to an older durable checkpoint, for good."""
        assert self._rollback_to is None
        self._rollback_to = version
        if self.phase == "closed" and self._closing is None:
            return [RollBack(version, ())]
        return self.close(f"it goes back to version {version}")

    def rolled_back(self, failure: str) -> list[Action]:
        """The older checkpoint is the newest now; or nothing has changed, and `failure` says why."""
        assert self._rollback_to is not None
        version, self._rollback_to = self._rollback_to, None
        if failure:
            return [Closed(f"no rollback: {failure}", ()), *self._restore_if_complete()]
        self.work.rolled_back(version)
        return self._restore_if_complete()

    def close(self, reason: str, *, failed: str | None = None, unfit: str | None = None) -> list[Action]:
        """Give everything back that is not durable; `failed`, `unfit`: the batch to blame."""
        if self.phase == "closed":
            return []
        self.phase, self._has_spoken = "closed", False
        closed = Closed(reason, self.work.close(), failed, unfit)
        if self.work.saves.is_writing:
            # Whether its batches are durable is only known when the manifest is written.
            self._closing = closed
            return []
        return self._finish_closing(closed)

    @property
    def _can_restore(self) -> bool:
        is_busy = self.is_closing or self.is_rolling_back
        return self.phase == "closed" and not is_busy and self._members.are_complete

    def _stepped(self, event: BatchStepped, now_s: float) -> list[Action]:
        if misstep := self.work.misstep(event):
            return self.close(misstep) + self._restore_if_complete()
        return self.work.stepped(event, now_s) + self.work.advance(now_s)

    def _failed(self, stage: int, failure: TrainingFailed) -> list[Action]:
        closed = self.close(
            f"stage {stage} failed: {failure.reason}",
            failed=failure.batch_id if failure.is_batch_at_fault else None,
            unfit=failure.batch_id if failure.lacks_memory else None,
        )
        return closed + self._restore_if_complete()

    def _finish_closing(self, closed: Closed) -> list[Action]:
        self._closing = None
        abandoned = self.work.forget(closed.reason)
        if self._rollback_to is not None:
            return [*abandoned, RollBack(self._rollback_to, closed.unfinished)]
        return [*abandoned, closed]

    def _restore_if_complete(self) -> list[Action]:
        if not (self._can_restore and self._may_restore):
            return []
        self.phase, self._may_restore = "restoring", not self._joins_others
        self.fence = next(self._fences)
        self.work.begin(self.fence, self.num_stages)
        return [Restore(self.fence, self.num_stages)]
