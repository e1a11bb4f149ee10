"""One node's work so far, from its stages' reports, and the future that follows from it. Pure.

Messages of different stages overtake each other, come late, or get lost. So an event on a later stage
implies those on the earlier ones, and nothing that has ended comes back. A stage tells of its ops some time
after they happened; until then it is taken to do what was predicted, from its last report on.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from services.scheduler.costs import Costs
from services.scheduler.forecast import Forecast, Interval
from services.scheduler.node.iteration_queue import IterationQueue
from services.scheduler.node.known_work import (
    BACKWARD,
    BACKWARD_SHARE,
    FORWARD,
    ITERATION,
    STEP,
    Batch,
    KnownWork,
    Op,
    Running,
    batch_of,
    durations_of,
)
from services.scheduler.node.list_schedule import predict
from services.scheduler.node.now_running import NowRunning
from services.scheduler.node.prediction import Prediction
from services.scheduler.node.prediction_check import PredictionCheck
from services.scheduler.statistics import RunningMoments
from services.scheduler.tasks import Assigned, TaskShape
from shared.messages.cluster import TaskKind
from shared.messages.events import OpStarted, StageOp, StageProgress
from shared.messages.inference import Pace
from shared.profiles.times import NO_WORK, Work, work_of_rows
from shared.schedule import BY_DEFAULT, Feeding
from shared.slices import TRAINING_TURN, WHOLE, NumSlices
from shared.subjects import PROGRESS_EVERY_S

MIN_ROWS = 16
"""A prompt goes on by so many rows in each iteration, whatever the objective for the time between tokens."""
DECODE_OPS = 32
"""Ops of decodes alone that a prediction foresees: on two stages 16 iterations. Of 5 ms each, these are more
than go by between two reports."""


@dataclass(slots=True)
class _Leaving:
    """A task that has ended."""

    task: Assigned
    batch: Batch | None
    """None: it was a request."""
    until_s: float
    """By then its stages have told of all that they did for it."""


class NodeModel:
    """The work of one node. Only the cluster's state changes it; policies read it."""

    def __init__(self, num_stages: int, costs: Costs, *, feeding: Feeding = BY_DEFAULT) -> None:
        self.num_stages = num_stages
        self.max_in_flight = feeding.max_in_flight(num_stages)
        """Microbatches, and so activations, that the node may have to hold at once."""
        self.last_arrival_s: float | None = None
        """When the task assigned last had arrived (the paper's release)."""
        self.last_assigned: Assigned | None = None
        """Whether it lives or not."""
        self.last_active_s: float | None = None
        """When something happened here last: an assignment, or an op's start or end."""
        self.lengths = RunningMoments()
        """Lengths of all tasks assigned here, in tokens."""
        self._costs = costs
        self._flushes = feeding.flushes(num_stages)
        self._tasks: dict[str, Assigned] = {}
        """Living, in the order of their assignment."""
        self._batches: dict[str, Batch] = {}
        """The training batches among them."""
        self._running = NowRunning(num_stages)
        self._iterations = IterationQueue(num_stages, costs, self._running)
        self._leaving: dict[str, _Leaving] = {}
        """Tasks that have ended, in that order, and whose stages may not have told of their last ops: what is
        known of these still counts."""
        self._told_s = [0.0] * num_stages
        """By stage: when it sent its last report, which told of all before."""
        self._devices = list(range(num_stages))
        """By stage: the first stage on its device."""
        self._num_slices = [WHOLE] * num_stages
        self._slices_s = [0.0] * num_stages
        """By stage: the longest slice of the last batch."""
        self._iterated_s = [(0.0, 0.0)] * num_stages
        """By device: the end of the last iteration that it has told of, and how long that took."""
        self._after_backward = [False] * num_stages
        """By device: the last microbatch there that it has told of went backward."""
        self._feed_s = 0.0
        """When the next microbatch can enter at the earliest."""
        self._prediction: Prediction | None = None
        """None: something has happened since it was made that it did not foresee."""
        self._check: PredictionCheck | None = None

    # What policies read

    @property
    def num_inference(self) -> int:
        """Living inference tasks."""
        return len(self._tasks) - len(self._batches)

    @property
    def num_training(self) -> int:
        """Living training tasks."""
        return len(self._batches)

    @property
    def num_decoding(self) -> int:
        """Living inference tasks whose first token is out."""
        return len(self._iterations.decoding)

    @property
    def exposure_s(self) -> float:
        """Training that a request may yet meet: a slice of the longest forward of each stage after the first,
        summed.
        """
        forwards_s = [forward_s for batch in self._batches.values() for forward_s in batch.forward_s]
        return sum(
            max((each[stage] for each in forwards_s), default=0.0) / self._num_slices[stage].of_pass
            for stage in range(1, self.num_stages)
        )

    @property
    def tbt_s(self) -> float:
        """Time between two tokens once all requests here, and one more, decode."""
        return self._tbt_with(NO_WORK)

    @property
    def full_iteration_s(self) -> float:
        """Time of the slowest stage for an iteration with the decodes here and as many rows as it takes."""
        work = self._iterations.decode_share() + work_of_rows(0, self._costs.max_iteration_tokens)
        return max(durations_of(work, self._costs, self.num_stages))

    def keeps_pace(self, tbt_s: float) -> bool:
        """Whether the tokens of one more request can still come `tbt_s` after each other, beside training."""
        return self.tbt_s + sum(self._slices_s) <= tbt_s

    def pace(self, tbt_s: float) -> Pace:
        """The room that a request leaves to others, for which tokens are to come `tbt_s` after each other."""
        rest_s = tbt_s - sum(self._slices_s)
        turn = min(TRAINING_TURN, max(0.0, rest_s / self.tbt_s - 1))
        return Pace(rows_beside_decodes=self._rows_beside_decodes(rest_s), training_turn=turn)

    def _rows_beside_decodes(self, tbt_s: float) -> int:
        """Most rows of a prompt beside decodes with which tokens still come in time."""
        few, many = MIN_ROWS, self._costs.max_iteration_tokens
        while few < many:
            middle = (few + many + 1) // 2
            fits = self._tbt_with(work_of_rows(round(self.lengths.mean), middle)) <= tbt_s
            few, many = (middle, many) if fits else (few, middle - 1)
        return few

    def _tbt_with(self, more: Work) -> float:
        """Time between two tokens with more rows in each iteration: the way through all stages, or as many
        turns of the slowest stage as there are iterations in flight.
        """
        num_more = 1 + (self.num_inference - self.num_decoding) // self.num_stages
        rows = [work_of_rows(round(self.lengths.mean), 1)] * num_more
        work = sum(rows, self._iterations.decode_share()) + more
        durations_s = durations_of(work, self._costs, self.num_stages)
        way_s = sum(durations_s) + self.num_stages * self._costs.hop_s
        return max(way_s, self.num_stages * max(durations_s))

    def assigned(self) -> Iterable[Assigned]:
        """Living tasks in the order of their assignment."""
        return self._tasks.values()

    @property
    def prediction(self) -> Prediction:
        """The future as of the last unforeseen event here; made when it is first asked for."""
        if self._prediction is None:
            at_s = self.last_active_s or 0.0
            self._prediction = predict(self._known_work(at_s), at_s)
            self._check = PredictionCheck(self._prediction)
        return self._prediction

    @property
    def num_slices(self) -> tuple[NumSlices, ...]:
        """By stage: slices of training ops, between which they give way to iterations."""
        return tuple(self._num_slices)

    @property
    def devices(self) -> tuple[int, ...]:
        """By stage: the first stage on its device; empty: each has its own."""
        shares = any(stage != device for stage, device in enumerate(self._devices))
        return tuple(self._devices) if shares else ()

    # What changes it

    def put_on_device(self, stage: int, first_stage: int | None) -> None:
        """Note that a stage is on the device of another one; None: on its own."""
        device = stage if first_stage is None else first_stage
        if max(stage, device) < self.num_stages and self._devices[stage] != device:
            self._devices[stage], self._prediction = device, None

    def cut(self, stage: int, num_slices: NumSlices) -> None:
        """Note into how many slices a stage cuts its training ops."""
        if stage < self.num_stages and self._num_slices[stage] != num_slices:
            self._num_slices[stage], self._prediction = num_slices, None

    def assign(
        self,
        task_id: str,
        kind: TaskKind,
        shape: TaskShape,
        *,
        forecast: Forecast | None,
        arrived_s: float,
        now_s: float,
        due_s: float | None = None,
    ) -> None:
        """Assign a task to this node."""
        self._let_leave(now_s)
        task = Assigned(
            task_id,
            kind,
            shape,
            arrived_s,
            now_s,
            forward=list(forecast.forward if forecast else ()),
            backward=list(forecast.backward if forecast else ()),
            due_s=due_s,
        )
        self._tasks[task_id] = self.last_assigned = task
        self.last_arrival_s = arrived_s
        self.lengths.add(shape.num_tokens)
        if kind == "training":
            ready_s = now_s + 2 * self._costs.hop_s
            batch = batch_of(task_id, shape.microbatches, self._costs, self.num_stages, ready_s=ready_s)
            self._batches[task_id] = batch
            self._slices_s = [batch.slice_s(*each) for each in enumerate(self._num_slices)]
        else:
            ready_s, foreseen = now_s + self._costs.hop_s, self.prediction
            joins, waits = foreseen.last_entry_s > ready_s, foreseen.slot_s > ready_s
            self._iterations.add(task, ready_s, joins=joins, waits=waits)
        self.last_active_s, self._prediction = now_s, None
        if forecast is not None:
            task.expected_s = self.prediction.first_tokens_s.get(task_id)

    def end(self, task_id: str, now_s: float) -> None:
        """End a living task of this node, one way or another."""
        self._let_leave(now_s)
        task, batch = self._tasks.pop(task_id), self._batches.pop(task_id, None)
        self._leaving[task_id] = _Leaving(task, batch, now_s + self._silence_s)

    def clear(self) -> None:
        """Start again with all stages, and without tasks."""
        self._tasks.clear()
        self._batches.clear()
        self._running.clear()
        self._iterations.clear()
        self._leaving.clear()
        self._prediction = None

    def progressed(self, progress: StageProgress, now_s: float) -> list[Assigned]:
        """Take in a stage's report; returns the tasks whose first token is now out.

        `now_s`: the receiver's; the message has travelled for a hop.
        """
        self._let_leave(now_s)
        stage, sent_s = progress.stage, now_s - self._costs.hop_s
        self._running.by_stage[stage] = self._running.aside[stage] = None
        self._told_s[stage] = sent_s
        through: list[Assigned] = []
        for ended in progress.ended:
            end_s = sent_s - ended.ago_s
            if ended.op.kind == "iteration":
                self._iterated_s[self._devices[stage]] = end_s, ended.elapsed_s
                through += self._iterated(stage, ended.op, end_s - ended.elapsed_s, end_s)
            else:
                self._trained(stage, ended.op, end_s - ended.given_way_s - ended.elapsed_s, end_s)
        started = progress.running
        if started is not None:
            self._running.by_stage[stage] = self._running_of(stage, started, sent_s)
        if progress.aside is not None and (rest := self._running_of(stage, progress.aside, sent_s)):
            done_s = min(rest.op.duration_s, sent_s - rest.start_s)
            self._running.aside[stage] = rest.op._replace(
                duration_s=rest.op.duration_s - done_s, done_s=done_s
            )
        self.last_active_s = now_s
        if self._check is None or not self._check.holds(progress, sent_s):
            self._prediction = None
        return through

    @property
    def _silence_s(self) -> float:
        """How long after a stage has done something that is known here."""
        return PROGRESS_EVERY_S + self._costs.hop_s

    def _let_leave(self, now_s: float) -> None:
        """Forget tasks that ended so long ago that what nobody has told of never ran."""
        while self._leaving:
            task_id, leaving = next(iter(self._leaving.items()))
            if now_s < leaving.until_s:
                return
            del self._leaving[task_id]
            if not self._is_done(leaving):
                self._prediction = None
            if leaving.batch is not None:
                self._running.orphan(leaving.batch)
            else:
                self._iterations.remove(task_id)

    def _is_done(self, leaving: "_Leaving") -> bool:
        """Whether its end is known already."""
        task = leaving.task
        if leaving.batch is not None:
            return len(leaving.batch.stepped) == self.num_stages
        return task.first_token_s is not None and task.task_id not in self._iterations.decoding

    @property
    def _training_turn(self) -> float:
        """The least of the requests here."""
        requests = (task for task in self._tasks.values() if task.kind == "inference")
        return min((task.shape.pace.training_turn for task in requests), default=TRAINING_TURN)

    def _task(self, task_id: str) -> Assigned | None:
        """A task that lives, or whose stages may still tell of it."""
        leaving = self._leaving.get(task_id)
        return self._tasks.get(task_id) or (leaving.task if leaving else None)

    def _batch(self, batch_id: str) -> Batch | None:
        leaving = self._leaving.get(batch_id)
        return self._batches.get(batch_id) or (leaving.batch if leaving else None)

    def _running_of(self, stage: int, started: OpStarted, sent_s: float) -> Running | None:
        """The op that a stage has told of, as if it had run without a break; None when its task has ended."""
        start_s = sent_s - started.ago_s
        running = self._begun(stage, started.op, start_s)
        if running is None or not started.given_way_s:
            return running
        went_on_s, given_way_s = self._iterated_s[self._devices[stage]]
        turn_until_s = went_on_s + self._training_turn * given_way_s
        return running._replace(start_s=start_s + started.given_way_s, turn_until_s=turn_until_s)

    def _begun(self, stage: int, op: StageOp, start_s: float) -> Running | None:
        """The op that the stage runs; None when its task has ended."""
        if op.kind == "iteration":
            iteration = self._iterations.comes(stage, op)
            if iteration is None:
                return None
            return Running(Op(ITERATION, iteration, 0, iteration.durations_s[stage]), start_s)
        batch = self._batch(op.task_ids[0])
        if batch is None:
            return None
        if op.kind == "step":
            self._gathered(batch, start_s)
            return Running(Op(STEP, batch, 0, batch.step_s[stage]), start_s)
        is_forward = op.kind == "forward"
        self._reach(batch, op.index, self._pass_number(stage, is_forward), start_s)
        durations_s = (batch.forward_s if is_forward else batch.backward_s)[op.index]
        return Running(Op(FORWARD if is_forward else BACKWARD, batch, op.index, durations_s[stage]), start_s)

    def _iterated(self, stage: int, op: StageOp, start_s: float, end_s: float) -> list[Assigned]:
        iteration = self._iterations.comes(stage, op)
        if iteration is not None:
            iteration.stage, iteration.ready_s = stage + 1, end_s + self._costs.hop_s
        tasks = [task for task_id in op.task_ids if (task := self._task(task_id))]
        for task in tasks:
            if task.forward:
                task.forward[stage] = Interval(start_s, end_s)
        if stage < self.num_stages - 1:
            return []
        return self._iterations.leaves(op, tasks, end_s)

    def _trained(self, stage: int, op: StageOp, start_s: float, end_s: float) -> None:
        batch, task = self._batch(op.task_ids[0]), self._task(op.task_ids[0])
        if batch is None or task is None:
            return
        if op.kind == "step":
            self._gathered(batch, start_s)
            batch.stepped.add(stage)
            return
        is_forward, hop_s = op.kind == "forward", self._costs.hop_s
        self._after_backward[self._devices[stage]] = not is_forward
        self._reach(batch, op.index, self._pass_number(stage, is_forward) + 1, end_s + hop_s)
        if stage == 0:
            self._feed_s = end_s
        count = len(batch.passes)
        if not is_forward:
            _overwrite(task.backward, stage, op.index, count, Interval(start_s, end_s))
        elif stage < self.num_stages - 1:
            _overwrite(task.forward, stage, op.index, count, Interval(start_s, end_s))
        else:
            turn_s = end_s - BACKWARD_SHARE * (end_s - start_s)
            _overwrite(task.forward, stage, op.index, count, Interval(start_s, turn_s))
            _overwrite(task.backward, stage, op.index, count, Interval(turn_s, end_s))

    def _gathered(self, batch: Batch, step_s: float) -> None:
        """Note that a batch has all its gradients, since a stage steps."""
        for microbatch in range(len(batch.passes)):
            self._reach(batch, microbatch, 2 * self.num_stages - 1, step_s - self._costs.hop_s)

    def _pass_number(self, stage: int, is_forward: bool) -> int:
        return stage if is_forward else 2 * (self.num_stages - 1) - stage

    def _reach(self, batch: Batch, microbatch: int, num_passes: int, at_s: float) -> None:
        """Note that a microbatch has done so many passes."""
        if batch.passes[microbatch] < num_passes:
            batch.passes[microbatch], batch.ready_s[microbatch] = num_passes, at_s
            self._running.passed(batch, microbatch)

    def _known_work(self, now_s: float) -> KnownWork:
        known = KnownWork(
            num_stages=self.num_stages,
            hop_s=self._costs.hop_s,
            running=list(self._running.by_stage),
            aside=list(self._running.aside),
            num_slices=self._num_slices,
            training_turn=self._training_turn,
            devices=self.devices,
            told_s=[max(told_s, now_s - self._silence_s) for told_s in self._told_s],
            in_flight=self._iterations.in_flight,
            formed=self._iterations.formed,
            after_backward=self._after_backward,
            batches=[each.batch for each in self._leaving.values() if each.batch is not None]
            + list(self._batches.values()),
            feed_s=self._feed_s,
            max_in_flight=self.max_in_flight,
            flushes=self._flushes,
        )
        if decoding := self._iterations.decoding.values():
            known.joins = self._iterations.decode_share()
            decode_s = known.joins_s = durations_of(known.joins, self._costs, self.num_stages)
            known.num_decoding = len(decoding)
            known.num_decode_iterations = max(1, DECODE_OPS // self.num_stages)
            num_parallel = min(1.0, len(decoding) / self.num_stages)
            known.decode_s = [0.0] * self.num_stages
            for device, seconds in zip(self._devices, decode_s, strict=True):
                known.decode_s[device] += seconds
            known.decode_gap_s = [num_parallel * seconds for seconds in known.decode_s]
            num_left = sum(task.shape.max_tokens - task.num_generated for task in decoding) / len(decoding)
            known.decode_until_s = now_s + num_left * (sum(decode_s) + self.num_stages * self._costs.hop_s)
        return known


def _overwrite(intervals: list[Interval], stage: int, microbatch: int, count: int, actual: Interval) -> None:
    """Put the real start (first microbatch) or end (last microbatch) into the batch's interval."""
    if not intervals:
        return
    before = intervals[stage]
    start_s = actual.start_s if microbatch == 0 else before.start_s
    end_s = actual.end_s if microbatch == count - 1 else max(before.end_s, actual.end_s)
    intervals[stage] = Interval(start_s, end_s)
