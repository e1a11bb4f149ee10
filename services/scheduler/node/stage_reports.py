"""The reports of one node's stages: what they have told of their ops so far. Pure.

Messages of different stages overtake each other, come late, or get lost. So an event on a later stage
implies those on the earlier ones, and nothing that has ended comes back.
"""

from services.scheduler.costs import Costs
from services.scheduler.forecast import Interval
from services.scheduler.node.iteration_queue import IterationQueue
from services.scheduler.node.known_work import (
    BACKWARD,
    BACKWARD_SHARE,
    FORWARD,
    ITERATION,
    STEP,
    Batch,
    Op,
    Running,
)
from services.scheduler.node.node_tasks import NodeTasks
from services.scheduler.node.now_running import NowRunning
from services.scheduler.tasks import Assigned
from shared.messages.events import OpStarted, StageOp, StageProgress


class StageReports:
    """Takes reports in: what runs, how far iterations and batches have come, and when each was where."""

    def __init__(
        self,
        num_stages: int,
        costs: Costs,
        tasks: NodeTasks,
        iterations: IterationQueue,
        running: NowRunning,
    ) -> None:
        self.devices = list(range(num_stages))
        """By stage: the first stage on its device."""
        self.told_s = [0.0] * num_stages
        """By stage: when it sent its last report, which told of all before."""
        self.after_backward = [False] * num_stages
        """By device: the last microbatch there that it has told of went backward."""
        self.feed_s = 0.0
        """When the next microbatch can enter at the earliest."""
        self._iterated_s = [(0.0, 0.0)] * num_stages
        """By device: the end of the last iteration that it has told of, and how long that took."""
        self._last = num_stages - 1
        self._costs = costs
        self._tasks = tasks
        self._iterations = iterations
        self._running = running

    def take_in(self, progress: StageProgress, sent_s: float) -> list[Assigned]:
        """Take in a stage's report; returns the tasks whose first token is now out."""
        stage = progress.stage
        self._running.by_stage[stage] = self._running.aside[stage] = None
        self.told_s[stage] = sent_s
        through: list[Assigned] = []
        for ended in progress.ended:
            end_s = sent_s - ended.ago_s
            if ended.op.kind == "iteration":
                self._iterated_s[self.devices[stage]] = end_s, ended.elapsed_s
                through += self._iterated(stage, ended.op, end_s - ended.elapsed_s, end_s)
            else:
                self._trained(stage, ended.op, end_s - ended.given_way_s - ended.elapsed_s, end_s)
        if progress.running is not None:
            self._running.by_stage[stage] = self._running_of(stage, progress.running, sent_s)
        if progress.aside is not None and (rest := self._running_of(stage, progress.aside, sent_s)):
            done_s = min(rest.op.duration_s, sent_s - rest.start_s)
            self._running.aside[stage] = rest.op._replace(
                duration_s=rest.op.duration_s - done_s, done_s=done_s
            )
        return through

    # What runs

    def _running_of(self, stage: int, started: OpStarted, sent_s: float) -> Running | None:
        """The op that a stage has told of, as if it had run without a break; None when its task has ended."""
        start_s = sent_s - started.ago_s
        running = self._begun(stage, started.op, start_s)
        if running is None or not started.given_way_s:
            return running
        went_on_s, given_way_s = self._iterated_s[self.devices[stage]]
        turn_until_s = went_on_s + self._tasks.training_turn * given_way_s
        return running._replace(start_s=start_s + started.given_way_s, turn_until_s=turn_until_s)

    def _begun(self, stage: int, op: StageOp, start_s: float) -> Running | None:
        """The op that the stage runs; None when its task has ended."""
        if op.kind == "iteration":
            iteration = self._iterations.comes(stage, op)
            if iteration is None:
                return None
            return Running(Op(ITERATION, iteration, 0, iteration.durations_s[stage]), start_s)
        batch = self._tasks.batch(op.task_ids[0])
        if batch is None:
            return None
        if op.kind == "step":
            self._gathered(batch, start_s)
            return Running(Op(STEP, batch, 0, batch.step_s[stage]), start_s)
        is_forward = op.kind == "forward"
        self._reach(batch, op.index, self._pass_number(stage, is_forward), start_s)
        durations_s = (batch.forward_s if is_forward else batch.backward_s)[op.index]
        return Running(Op(FORWARD if is_forward else BACKWARD, batch, op.index, durations_s[stage]), start_s)

    # What has ended

    def _iterated(self, stage: int, op: StageOp, start_s: float, end_s: float) -> list[Assigned]:
        iteration = self._iterations.comes(stage, op)
        if iteration is not None:
            iteration.stage, iteration.ready_s = stage + 1, end_s + self._costs.hop_s
        tasks = [task for task_id in op.task_ids if (task := self._tasks.task(task_id))]
        for task in tasks:
            if task.forward:
                task.forward[stage] = Interval(start_s, end_s)
        if stage < self._last:
            return []
        return self._iterations.leaves(op, tasks, end_s)

    def _trained(self, stage: int, op: StageOp, start_s: float, end_s: float) -> None:
        batch, task = self._tasks.batch(op.task_ids[0]), self._tasks.task(op.task_ids[0])
        if batch is None or task is None:
            return
        if op.kind == "step":
            self._gathered(batch, start_s)
            batch.stepped.add(stage)
            return
        is_forward, hop_s = op.kind == "forward", self._costs.hop_s
        self.after_backward[self.devices[stage]] = not is_forward
        self._reach(batch, op.index, self._pass_number(stage, is_forward) + 1, end_s + hop_s)
        if stage == 0:
            self.feed_s = end_s
        count = len(batch.passes)
        if not is_forward:
            _overwrite(task.backward, stage, op.index, count, Interval(start_s, end_s))
        elif stage < self._last:
            _overwrite(task.forward, stage, op.index, count, Interval(start_s, end_s))
        else:
            turn_s = end_s - BACKWARD_SHARE * (end_s - start_s)
            _overwrite(task.forward, stage, op.index, count, Interval(start_s, turn_s))
            _overwrite(task.backward, stage, op.index, count, Interval(turn_s, end_s))

    # How far a batch has come

    def _gathered(self, batch: Batch, step_s: float) -> None:
        """Note that a batch has all its gradients, since a stage steps."""
        for microbatch in range(len(batch.passes)):
            self._reach(batch, microbatch, 2 * self._last + 1, step_s - self._costs.hop_s)

    def _pass_number(self, stage: int, is_forward: bool) -> int:
        return stage if is_forward else 2 * self._last - stage

    def _reach(self, batch: Batch, microbatch: int, num_passes: int, at_s: float) -> None:
        """Note that a microbatch has done so many passes."""
        if batch.passes[microbatch] < num_passes:
            batch.passes[microbatch], batch.ready_s[microbatch] = num_passes, at_s
            self._running.passed(batch, microbatch)


def _overwrite(intervals: list[Interval], stage: int, microbatch: int, count: int, actual: Interval) -> None:
    """Put the real start (first microbatch) or end (last microbatch) into the batch's interval."""
    if not intervals:
        return
    before = intervals[stage]
    start_s = actual.start_s if microbatch == 0 else before.start_s
    end_s = actual.end_s if microbatch == count - 1 else max(before.end_s, actual.end_s)
    intervals[stage] = Interval(start_s, end_s)
