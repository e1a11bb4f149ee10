"""One node as the trainer drives it: events in, actions out. Reads no clock and sends nothing."""

from collections.abc import Callable, Iterator, Sequence

from services.trainer.nodes.decisions import Action, Closed, Halted, Restore, RollBack
from services.trainer.nodes.node_life import NodeLife
from services.trainer.nodes.node_work import NodeWork
from services.trainer.nodes.rules import Rules
from services.trainer.nodes.stall_watch import STALLED_AFTER_S, StallWatch
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
    """A node's life and its work. Each method takes what has happened and returns what to do, in order."""

    def __init__(
        self, node: int, num_stages: int, *, rules: Rules, durable_version: int, fences: Iterator[int]
    ) -> None:
        self.node = node
        self.life = NodeLife(num_stages, fences=fences, joins_others=rules.shares_weights)
        self.work = NodeWork(durable_version, rules=rules)
        self._stall_watch = StallWatch()

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
        if self.life.phase != "open":
            return None
        published = self.work.publishing.published
        return self.version if published is None else published

    @property
    def is_known(self) -> bool:
        """Whether batches may be placed here: they are fed at once, or when the restore is through."""
        return self.life.phase != "closed" and not self.work.gate.halt_reason

    def heartbeat(self, beat: Heartbeat, now_s: float) -> list[Action]:
        """A stage is alive."""
        is_restart = self.life.members.is_restart(beat)
        actions = self.close(f"stage {beat.stage} was restarted") if is_restart else []
        self.life.heard(beat, now_s)
        return actions + self._restore_if_complete()

    def tick(self, now_s: float) -> list[Action]:
        """Time has passed."""
        if lost := self.life.members.lost(now_s):
            self.life.members = self.life.members.without(lost)
            return self.close(f"stages {lost} are silent")
        is_open = self.life.phase == "open"
        if self._stall_watch.is_stalled(now_s, has_work=is_open and not self.work.steps.has_nothing_begun):
            return self.close(f"no report for {STALLED_AFTER_S:g} s") + self._restore_if_complete()
        return self.work.tick(now_s) if is_open else []

    def messages_lost(self) -> list[Action]:
        """The connection was lost and is back: what is on its way may never be reported."""
        phase = self.life.phase
        if phase == "restoring" or (phase == "open" and self.work.is_waiting):
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
        if self.life.phase != "restoring" or fence != self.life.fence:
            return []
        if failure:
            # The next heartbeat that finds the node complete tries again.
            return self.close(f"the restore failed: {failure}")
        self.life.phase = "open"
        served = self.version if served is None else served
        newest_tried = self.version if is_judged else served
        restored = self.work.publishing.restored(served, rise=rise, newest_tried=newest_tried)
        return [*restored, *self.work.open(now_s)]

    def report(self, report: StageReport, now_s: float) -> list[Action]:
        """Something happened on a stage; what belongs to an earlier life of the node is ignored."""
        if report.fence != self.life.fence or self.life.phase != "open":
            return []
        work = self.work
        if isinstance(report.event, VersionsServed):
            return [*work.publishing.served(report.event), *work.advance(now_s)]
        self._stall_watch.restart()
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

    def in_life(self, fence: int, decide: Callable[[NodeWork], Sequence[Action]]) -> list[Action]:
        """Let the work decide on an answer, unless the node's life that asked for it is over."""
        return list(decide(self.work)) if fence == self.life.fence else []

    def checkpoint_written(self, version: int, failure: str, now_s: float) -> list[Action]:
        """The checkpoint is durable, or is not (`failure` says why)."""
        assert self.work.saves.version == version
        actions = self.work.saves.written(failure)
        if self.life.closing is not None:
            return actions + self._finish_closing(self.life.closing) + self._restore_if_complete()
        return actions + self.work.advance(now_s)

    def allow_restore(self, durable_version: int) -> list[Action]:
        """The closed node may join; that is the version that all nodes' newest checkpoint holds."""
        self.life.allow_restore()
        self.work.adopt(durable_version)
        return self._restore_if_complete()

    def halt(self, reason: str) -> list[Action]:
        """Train no more: what has begun goes on to its end, the rest is for others."""
        if self.life.is_closing:  # then all is given back anyway
            self.work.gate.halt_reason = reason
            return [Halted(reason)]
        return self.work.halt(reason)

    def roll_back(self, version: int) -> list[Action]:
        """The node must go back to an older durable checkpoint, for good."""
        assert self.life.rollback_to is None
        self.life.rollback_to = version
        if self.life.phase == "closed" and not self.life.is_closing:
            return [RollBack(version, ())]
        return self.close(f"it goes back to version {version}")

    def rolled_back(self, failure: str) -> list[Action]:
        """The older checkpoint is the newest now; or nothing has changed, and `failure` says why."""
        assert self.life.rollback_to is not None
        version, self.life.rollback_to = self.life.rollback_to, None
        if failure:
            return [Closed(f"no rollback: {failure}", ()), *self._restore_if_complete()]
        self.work.gate.rolled_back()
        self.work.adopt(version)
        return self._restore_if_complete()

    def close(self, reason: str, *, failed: str | None = None, unfit: str | None = None) -> list[Action]:
        """Give everything back that is not durable; `failed`, `unfit`: the batch to blame."""
        if self.life.phase == "closed":
            return []
        self.life.close()
        self._stall_watch.restart()
        closed = Closed(reason, self.work.close(), failed, unfit)
        if self.work.saves.is_writing:
            # Whether its batches are durable is only known when the manifest is written.
            self.life.closing = closed
            return []
        return self._finish_closing(closed)

    def _stepped(self, event: BatchStepped, now_s: float) -> list[Action]:
        if misstep := self.work.steps.misstep(event):
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
        self.life.closing = None
        abandoned = self.work.forget(closed.reason)
        if self.life.rollback_to is not None:
            return [*abandoned, RollBack(self.life.rollback_to, closed.unfinished)]
        return [*abandoned, closed]

    def _restore_if_complete(self) -> list[Action]:
        if not self.life.can_restore:
            return []
        self.life.begin_restore()
        fence, num_stages = self.life.fence, self.life.members.num_stages
        self.work.begin(fence, num_stages)
        return [Restore(fence, num_stages)]
