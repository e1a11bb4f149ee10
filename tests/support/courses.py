"""Nodes with work on them, and stages that do exactly what was predicted, for tests of predictions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.scheduler.node.known_work import BACKWARD, FORWARD, ITERATION, STEP, Batch, Iteration, Op
from services.scheduler.node.prediction import Prediction
from services.scheduler.node.timeline import NodeTimeline
from services.scheduler.tasks import TaskShape
from shared.messages.events import OpEnded, OpKind, OpStarted, StageOp, StageProgress
from shared.profiles.times import Work, work_of_rows
from shared.settings import MAX_ITERATION_TOKENS

NAMES: dict[int, OpKind] = {
    ITERATION: "iteration",
    STEP: "step",
    BACKWARD: "backward",
    FORWARD: "forward",
}


@dataclass
class UnevenCosts:
    """Linear in tokens, other on each stage. Implements `Costs`; learns nothing."""

    num_stages: int | None
    hop_s: float
    max_iteration_tokens: int = MAX_ITERATION_TOKENS

    def iteration_s(self, stage: int, work: Work) -> float:
        return (0.0010123 + 0.00031 * stage) * work.num_tokens

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


def node_with(
    prompts: Sequence[int], batches: Sequence[Sequence[int]], *, num_stages: int, hop_s: float
) -> NodeTimeline:
    """Everything is placed at time 0: requests `r0`, ... of so many tokens; batches `b0`, ..."""
    timeline = NodeTimeline(num_stages, UnevenCosts(num_stages, hop_s))
    for index, tokens in enumerate(prompts):
        shape = TaskShape(prompt_tokens=tokens, max_tokens=1)
        timeline.assign(f"r{index}", "inference", shape, forecast=None, arrived_s=0.0, now_s=0.0)
    for index, microbatches in enumerate(batches):
        shape = TaskShape(microbatches=tuple(work_of_rows(0, tokens) for tokens in microbatches))
        timeline.assign(f"b{index}", "training", shape, forecast=None, arrived_s=0.0, now_s=0.0)
    return timeline


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


def tell(timeline: NodeTimeline, course: Prediction, until_s: float, hop_s: float) -> None:
    """Let the stages do what `course` says, up to `until_s`, and tell the timeline of it at once."""
    numbers: dict[int, int] = {}
    for at_s, stage, is_start, place, op in happenings(course):
        if at_s > until_s:
            return
        told = _stage_op(timeline, op, numbers)
        elapsed_s = course.ends_s[stage][place] - course.starts_s[stage][place]
        progress = StageProgress(
            node=0,
            stage=stage,
            ended=() if is_start else (OpEnded(op=told, elapsed_s=elapsed_s, ago_s=0.0),),
            running=OpStarted(op=told, ago_s=0.0) if is_start else None,
        )
        timeline.progressed(progress, at_s + hop_s)


def _stage_op(timeline: NodeTimeline, op: Op, numbers: dict[int, int]) -> StageOp:
    if isinstance(op.flow, Iteration):
        number = numbers.setdefault(id(op.flow), len(numbers))
        return _op("iteration", op.flow.completes, number, op.flow.work)
    assert isinstance(op.flow, Batch)
    if op.kind == STEP:
        return _op("step", (op.flow.batch_id,), 0, Work(0, 0, 0))
    (task,) = [task for task in timeline.assigned() if task.task_id == op.flow.batch_id]
    return _op(NAMES[op.kind], (op.flow.batch_id,), op.microbatch, task.shape.microbatches[op.microbatch])


def _op(kind: OpKind, task_ids: tuple[str, ...], index: int, work: Work) -> StageOp:
    return StageOp(
        kind=kind,
        task_ids=task_ids,
        index=index,
        num_tokens=work.num_tokens,
        num_pairs=work.num_pairs,
        num_sequences=work.num_sequences,
    )


def ops_after(course: Prediction, at_s: float) -> Iterator[tuple[int, str, float, float]]:
    """(stage, kind, start, end) of what starts after `at_s`."""
    for stage, ops in enumerate(course.ops):
        for place, op in enumerate(ops):
            if course.starts_s[stage][place] > at_s:
                yield stage, NAMES[op.kind], course.starts_s[stage][place], course.ends_s[stage][place]
