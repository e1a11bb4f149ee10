"""Nodes with work on them, and stages that do exactly what was predicted, for tests of predictions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from services.scheduler.node.known_work import BACKWARD, FORWARD, ITERATION, STEP, Batch, Iteration, Op
from services.scheduler.node.node_model import NodeModel
from services.scheduler.node.prediction import Prediction
from services.scheduler.tasks import TaskShape
from shared.messages.cluster import TaskKind
from shared.messages.events import OpEnded, OpKind, OpStarted, StageOp, StageProgress
from shared.profiles.times import NO_WORK, Work, work_of_rows
from shared.settings import MAX_ITERATION_TOKENS
from shared.slices import NumSlices

NAMES: dict[int, OpKind] = {
    ITERATION: "iteration",
    STEP: "step",
    BACKWARD: "backward",
    FORWARD: "forward",
}


@dataclass
class UnevenCosts:
    """Linear in tokens, other on each stage. Implements `Costs`; learns nothing.

    The costs of three stages form no arithmetic series: ops of different stages do not end at one instant.
    """

    num_stages: int | None
    hop_s: float
    max_iteration_tokens: int = MAX_ITERATION_TOKENS

    def iteration_s(self, stage: int, work: Work) -> float:
        return (0.0010123 + 0.00031 * stage + 0.0000717 * stage**2) * work.num_tokens

    def forward_s(self, stage: int, work: Work) -> float:
        return self.iteration_s(stage, work) * (3.1 if stage == self._last else 1.0)

    def backward_s(self, stage: int, work: Work) -> float:
        return 0.0 if stage == self._last else 2.1 * self.iteration_s(stage, work)

    def step_s(self, stage: int) -> float:
        return 0.0517 + 0.0031 * stage

    def observe(self, stage: int, kind: OpKind, work: Work, elapsed_s: float) -> None:
        pass

    @property
    def _last(self) -> int:
        assert self.num_stages is not None
        return self.num_stages - 1


@dataclass(frozen=True)
class Load:
    """Requests and batches that come together: tokens of prompts, and of the microbatches of each batch."""

    prompts: Sequence[int] = ()
    batches: Sequence[Sequence[int]] = ()

    def shapes(self) -> list[TaskShape]:
        """Requests first."""
        requests = [TaskShape(prompt_tokens=tokens, max_tokens=1) for tokens in self.prompts]
        works = [tuple(work_of_rows(0, tokens) for tokens in batch) for batch in self.batches]
        return [*requests, *(TaskShape(microbatches=each) for each in works)]


@dataclass(frozen=True)
class Past:
    """The tasks that have come to a node, and the work of its stages in between."""

    at_s: float = 0.0
    first: Load = field(default_factory=Load)
    pause_s: float = 0.0
    second: Load = field(default_factory=Load)

    @property
    def batches(self) -> list[Sequence[int]]:
        return [*self.first.batches, *self.second.batches]

    @property
    def prompts(self) -> list[int]:
        return [*self.first.prompts, *self.second.prompts]


@dataclass
class _Begun:
    """An op that a stage has begun."""

    since_s: float
    given_way_s: float = 0.0
    aside_since_s: float | None = None
    """None: it runs."""


class Node:
    """A node whose stages do exactly what is predicted, and tell of it at once."""

    def __init__(
        self, num_stages: int, hop_s: float, devices: Sequence[int] = (), *, num_slices: int = 1
    ) -> None:
        self.timeline = NodeModel(num_stages, UnevenCosts(num_stages, hop_s))
        for stage, device in enumerate(devices[:num_stages]):
            self.timeline.put_on_device(stage, device)
        for stage in range(num_stages):
            self.timeline.cut(stage, NumSlices(num_slices, num_slices))
        self.now_s = 0.0
        self.done_s = [0.0] * num_stages
        """By stage: seconds in ops that are over."""
        self.waiting: set[str] = set()
        """Requests whose prompt is not through."""
        self._hop_s = hop_s
        self._num_begun = 0
        """Iterations."""
        self._begun: dict[tuple[int, StageOp], _Begun] = {}
        """By stage and op: those that have not ended."""
        self._iterations: dict[Iteration, StageOp] = {}
        """The op that is told of each: one and the same, however often the course is made anew meanwhile."""

    @property
    def prediction(self) -> Prediction:
        return self.timeline.prediction

    @property
    def told_s(self) -> float:
        """Everything that has happened by then is known."""
        return self.now_s - self._hop_s

    def place(self, load: Load) -> None:
        """At this moment."""
        for shape in load.shapes():
            kind: TaskKind = "training" if shape.microbatches else "inference"
            task_id = f"{kind} {len(list(self.timeline.assigned()))}"
            self.timeline.assign(task_id, kind, shape, forecast=None, arrived_s=self.now_s, now_s=self.now_s)
            if kind == "inference":
                self.waiting.add(task_id)

    def go_on(self, until_s: float) -> None:
        """Let the stages do what is predicted; the last thing is told by then."""
        course, from_s = self.prediction, self.told_s
        in_flight = course.known.in_flight
        for number, flow in enumerate(in_flight, self._num_begun - len(in_flight)):
            self._iterations.setdefault(flow, _iteration(flow, number))
        for at_s, stage, is_start, place, op in happenings(course):
            if from_s < at_s <= until_s - self._hop_s:
                told, start_s = self._told(op), course.starts_s[stage][place]
                begun = self._begun.setdefault((stage, told), _Begun(start_s))
                self._happens(stage, told, begun, at_s, is_start=is_start, stands_aside=op.rest_s > 0)
        self.now_s = max(self.now_s, until_s)

    def _happens(
        self, stage: int, op: StageOp, begun: _Begun, at_s: float, *, is_start: bool, stands_aside: bool
    ) -> None:
        if is_start and begun.aside_since_s is not None:
            begun.given_way_s += at_s - begun.aside_since_s
            begun.aside_since_s = None
        elif not is_start and stands_aside:
            begun.aside_since_s = at_s
        elif not is_start:
            del self._begun[stage, op]
            elapsed_s = at_s - begun.since_s - begun.given_way_s
            self.done_s[stage] += elapsed_s
            ended = OpEnded(op=op, elapsed_s=elapsed_s, ago_s=0.0, given_way_s=begun.given_way_s)
            self._tell(stage, at_s, ended)
            return
        self._tell(stage, at_s)

    def _tell(self, stage: int, at_s: float, *ended: OpEnded) -> None:
        def started(op: StageOp, begun: _Begun) -> OpStarted:
            given_way_s = begun.given_way_s + (at_s - begun.aside_since_s if begun.aside_since_s else 0.0)
            return OpStarted(op=op, ago_s=at_s - begun.since_s, given_way_s=given_way_s)

        here = [(op, begun) for (on, op), begun in self._begun.items() if on == stage]
        running = [started(op, begun) for op, begun in here if begun.aside_since_s is None]
        aside = [started(op, begun) for op, begun in here if begun.aside_since_s is not None]
        progress = StageProgress(
            node=0, stage=stage, ended=ended, running=next(iter(running), None), aside=next(iter(aside), None)
        )
        through = self.timeline.progressed(progress, at_s + self._hop_s)
        self.waiting -= {task.task_id for task in through}

    def _told(self, op: Op) -> StageOp:
        if isinstance(op.flow, Iteration):
            if op.flow not in self._iterations:  # from now on the timeline may change what it had foreseen
                self._iterations[op.flow] = _iteration(op.flow, self._num_begun)
                self._num_begun += 1
            return self._iterations[op.flow]
        assert isinstance(op.flow, Batch)
        if op.kind == STEP:
            return _op("step", (op.flow.batch_id,), 0, NO_WORK)
        (task,) = [task for task in self.timeline.assigned() if task.task_id == op.flow.batch_id]
        return _op(NAMES[op.kind], (op.flow.batch_id,), op.microbatch, task.shape.microbatches[op.microbatch])


def node_after(
    past: Past, *, num_stages: int, hop_s: float, devices: Sequence[int] = (), num_slices: int = 1
) -> Node:
    """`devices`: by stage, the first one on its device; of stages that there are not, too."""
    node = Node(num_stages, hop_s, devices, num_slices=num_slices)
    node.now_s = past.at_s
    node.place(past.first)
    node.go_on(past.at_s + past.pause_s)
    node.place(past.second)
    return node


Happening = tuple[float, int, bool, int, Op]
"""(time, stage, is start, place on the stage, op)."""


def happenings(course: Prediction) -> list[Happening]:
    """Starts and ends of all ops in time; of one instant, ends first."""
    found = []
    for stage, ops in enumerate(course.ops):
        for place, op in enumerate(ops):
            found.append((course.starts_s[stage][place], stage, True, place, op))
            found.append((course.ends_s[stage][place], stage, False, place, op))
    return sorted(found, key=lambda each: (each[0], each[2], each[1], each[3]))


def _iteration(flow: Iteration, number: int) -> StageOp:
    return _op("iteration", flow.completes, number, flow.work)


def _op(kind: OpKind, task_ids: tuple[str, ...], index: int, work: Work) -> StageOp:
    return StageOp(
        kind=kind,
        task_ids=task_ids,
        index=index,
        num_tokens=work.num_tokens,
        num_pairs=work.num_pairs,
        num_sequences=work.num_sequences,
        num_context_tokens=work.num_context_tokens,
    )


def ops_after(course: Prediction, at_s: float) -> Iterator[tuple[int, str, float, float]]:
    """(stage, kind, start, end) of what starts after `at_s`."""
    for stage, ops in enumerate(course.ops):
        for place, op in enumerate(ops):
            if course.starts_s[stage][place] > at_s:
                yield stage, NAMES[op.kind], course.starts_s[stage][place], course.ends_s[stage][place]
