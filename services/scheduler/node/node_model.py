"""One node's work so far, from its stages' reports, and the future that follows from it. Pure.

A stage tells of its ops some time after they happened; until then it is taken to do what was predicted, from
its last report on.
"""

from collections.abc import Iterable

from services.scheduler.costs import Costs
from services.scheduler.forecast import Forecast
from services.scheduler.node.iteration_queue import IterationQueue
from services.scheduler.node.known_work import KnownWork, batch_of, durations_of
from services.scheduler.node.list_schedule import predict
from services.scheduler.node.node_tasks import Leaving, NodeTasks
from services.scheduler.node.now_running import NowRunning
from services.scheduler.node.prediction import Prediction
from services.scheduler.node.prediction_check import PredictionCheck
from services.scheduler.node.stage_reports import StageReports
from services.scheduler.node.token_times import TokenTimes
from services.scheduler.statistics import RunningMoments
from services.scheduler.tasks import Assigned, TaskShape
from shared.messages.cluster import TaskKind
from shared.messages.events import StageProgress
from shared.schedule import BY_DEFAULT, Feeding
from shared.slices import WHOLE, NumSlices
from shared.subjects import PROGRESS_EVERY_S

DECODE_OPS = 32
"""Ops of decodes alone that a prediction foresees: on two stages 16 iterations. Of 5 ms each, these are more
than go by between two reports."""


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
        self._num_slices = [WHOLE] * num_stages
        self._tasks = NodeTasks()
        self._running = NowRunning(num_stages)
        self._iterations = IterationQueue(num_stages, costs, self._running)
        self._reports = StageReports(num_stages, costs, self._tasks, self._iterations, self._running)
        self.token_times = TokenTimes(num_stages, costs, self._tasks, self._iterations, self.lengths)
        self._prediction: Prediction | None = None
        """None: something has happened since it was made that it did not foresee."""
        self._check: PredictionCheck | None = None

    # What policies read

    @property
    def exposure_s(self) -> float:
        """Training that a request may yet meet: a slice of the longest forward of each stage after the first,
        summed.
        """
        forwards_s = [forward_s for batch in self._tasks.living_batches() for forward_s in batch.forward_s]
        return sum(
            max((each[stage] for each in forwards_s), default=0.0) / self._num_slices[stage].of_pass
            for stage in range(1, self.num_stages)
        )

    def assigned(self) -> Iterable[Assigned]:
        """Living tasks in the order of their assignment."""
        return self._tasks.living()

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
        shares = any(stage != device for stage, device in enumerate(self._reports.devices))
        return tuple(self._reports.devices) if shares else ()

    # What changes it

    def put_on_device(self, stage: int, first_stage: int | None) -> None:
        """Note that a stage is on the device of another one; None: on its own."""
        device = stage if first_stage is None else first_stage
        if max(stage, device) < self.num_stages and self._reports.devices[stage] != device:
            self._reports.devices[stage], self._prediction = device, None

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
        self.last_assigned, self.last_arrival_s = task, arrived_s
        self.lengths.add(shape.num_tokens)
        if kind == "training":
            ready_s = now_s + 2 * self._costs.hop_s
            batch = batch_of(task_id, shape.microbatches, self._costs, self.num_stages, ready_s=ready_s)
            self._tasks.add(task, batch)
            self.token_times.slices_s = [batch.slice_s(*each) for each in enumerate(self._num_slices)]
        else:
            self._tasks.add(task)
            ready_s, foreseen = now_s + self._costs.hop_s, self.prediction
            joins, waits = foreseen.last_entry_s > ready_s, foreseen.slot_s > ready_s
            self._iterations.add(task, ready_s, joins=joins, waits=waits)
        self.last_active_s, self._prediction = now_s, None
        if forecast is not None:
            task.expected_s = self.prediction.first_tokens_s.get(task_id)

    def end(self, task_id: str, now_s: float) -> None:
        """End a living task of this node, one way or another."""
        self._let_leave(now_s)
        self._tasks.end(task_id, now_s + self._silence_s)

    def clear(self) -> None:
        """Start again with all stages, and without tasks."""
        self._tasks.clear()
        self._running.clear()
        self._iterations.clear()
        self._prediction = None

    def progressed(self, progress: StageProgress, now_s: float) -> list[Assigned]:
        """Take in a stage's report; returns the tasks whose first token is now out.

        `now_s`: the receiver's; the message has travelled for a hop.
        """
        self._let_leave(now_s)
        sent_s = now_s - self._costs.hop_s
        through = self._reports.take_in(progress, sent_s)
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
        for leaving in self._tasks.forget(now_s):
            if not self._is_done(leaving):
                self._prediction = None
            if leaving.batch is not None:
                self._running.orphan(leaving.batch)
            else:
                self._iterations.remove(leaving.task.task_id)

    def _is_done(self, leaving: Leaving) -> bool:
        """Whether its end is known already."""
        task = leaving.task
        if leaving.batch is not None:
            return len(leaving.batch.stepped) == self.num_stages
        return task.first_token_s is not None and task.task_id not in self._iterations.decoding

    def _known_work(self, now_s: float) -> KnownWork:
        reports = self._reports
        known = KnownWork(
            num_stages=self.num_stages,
            hop_s=self._costs.hop_s,
            running=list(self._running.by_stage),
            aside=list(self._running.aside),
            num_slices=self._num_slices,
            training_turn=self._tasks.training_turn,
            devices=self.devices,
            told_s=[max(told_s, now_s - self._silence_s) for told_s in reports.told_s],
            in_flight=self._iterations.in_flight,
            formed=self._iterations.formed,
            after_backward=reports.after_backward,
            batches=self._tasks.known_batches(),
            feed_s=reports.feed_s,
            max_in_flight=self.max_in_flight,
            flushes=self._flushes,
        )
        self._add_decodes(known, now_s)
        return known

    def _add_decodes(self, known: KnownWork, now_s: float) -> None:
        decoding, devices = self._iterations.decoding.values(), self._reports.devices
        if not decoding:
            return
        known.joins = self._iterations.decode_share()
        decode_s = known.joins_s = durations_of(known.joins, self._costs, self.num_stages)
        known.num_decoding = len(decoding)
        known.num_decode_iterations = max(1, DECODE_OPS // self.num_stages)
        num_parallel = min(1.0, len(decoding) / self.num_stages)
        known.decode_s = [0.0] * self.num_stages
        for device, seconds in zip(devices, decode_s, strict=True):
            known.decode_s[device] += seconds
        known.decode_gap_s = [num_parallel * seconds for seconds in known.decode_s]
        num_left = sum(task.shape.max_tokens - task.num_generated for task in decoding) / len(decoding)
        known.decode_until_s = now_s + num_left * (sum(decode_s) + self.num_stages * self._costs.hop_s)
