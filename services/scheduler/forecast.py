"""When a task would run on each stage of a node, given all placed tasks. Pure; changes nothing.

A decision looks at many nodes. The task's path over a node with nothing else to do is the same for all of
them. It is made once (`inference_alone`, `training_alone`), by the same simulation that predicts nodes. For
each node it is then delayed, stage after stage, by the ops in its way there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.scheduler.costs import Costs
from services.scheduler.node.known_work import (
    BACKWARD,
    BACKWARD_SHARE,
    STEP,
    Iteration,
    KnownWork,
    batch_of,
    durations_of,
)
from services.scheduler.node.list_schedule import predict
from services.scheduler.node.prediction import Prediction
from shared.profiles.times import Work, work_of_rows


class Interval(NamedTuple):
    """A time on one stage (scheduler's clock)."""

    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """The predicted times of one task on the stages of a node.

    A training batch of several microbatches: from the first one's start to the last one's end.
    """

    forward: tuple[Interval, ...]
    """By stage."""
    backward: tuple[Interval, ...] = ()
    """By stage; training only."""
    idle_s: float = 0.0
    """Device time, summed over stages, that stays unused in front of the task because of its dependencies."""

    @property
    def end_s(self) -> float:
        """The end of the last stage's forward: the first token."""
        return self.forward[-1].end_s


@dataclass(frozen=True, slots=True)
class Alone:
    """A task that comes at time 0 to a node with nothing else to do."""

    costs: Costs
    work: Work
    """All of its rows."""
    forward: tuple[Interval, ...]
    backward: tuple[Interval, ...] = ()
    idle_s: float = 0.0

    def durations_with(self, others: Work) -> list[float]:
        """Durations by stage, with other rows in the iteration too; these cost every stage the same time."""
        durations_s = [end_s - start_s for start_s, end_s in self.forward]
        if others.num_tokens == 0:
            return durations_s
        ratio = self.costs.iteration_s(0, self.work + others) / durations_s[0]
        return [ratio * duration_s for duration_s in durations_s]

    def at(self, now_s: float) -> Forecast:
        """Its forecast when it comes at that time."""
        return Forecast(_shifted(self.forward, now_s), _shifted(self.backward, now_s), self.idle_s)


def inference_alone(
    costs: Costs, num_prompt_tokens: int, devices: Sequence[int] = (), cached_tokens: int = 0
) -> Alone:
    """Forecast a request alone: as few iterations as hold its prompt. The scheduler's message takes a hop.

    `devices`: as in `KnownWork`. `cached_tokens`: at the beginning of the prompt, which are not computed.
    """
    num_stages = _num_stages(costs)
    most = costs.max_iteration_tokens
    pieces = [
        work_of_rows(start, min(most, num_prompt_tokens - start))
        for start in range(cached_tokens, num_prompt_tokens, most)
    ]
    known = KnownWork(
        num_stages=num_stages,
        hop_s=costs.hop_s,
        running=[None] * num_stages,
        devices=devices,
        formed=[
            Iteration(work, durations_of(work, costs, num_stages), ready_s=costs.hop_s) for work in pieces
        ],
    )
    course = predict(known, 0.0)
    forward = tuple(map(_span, course.starts_s, course.ends_s))
    work = work_of_rows(cached_tokens, num_prompt_tokens - cached_tokens)
    return Alone(costs, work, forward, (), _idle_of(forward))


def training_alone(costs: Costs, microbatches: Sequence[Work], devices: Sequence[int] = ()) -> Alone:
    """Forecast a batch alone: the scheduler's answer and the microbatch to stage 0 take a hop each.

    `devices`: as in `KnownWork`.
    """
    num_stages = _num_stages(costs)
    known = KnownWork(
        num_stages=num_stages,
        hop_s=costs.hop_s,
        running=[None] * num_stages,
        devices=devices,
        batches=[batch_of("", microbatches, costs, num_stages, ready_s=2 * costs.hop_s)],
        max_in_flight=num_stages,
    )
    course = predict(known, 0.0)
    forward, backward = [], []
    for ops, starts_s, ends_s in zip(course.ops, course.starts_s, course.ends_s, strict=True):
        spans = list(zip(ops, starts_s, ends_s, strict=True))
        forwards = [(start_s, end_s) for op, start_s, end_s in spans if op.kind not in (BACKWARD, STEP)]
        backwards = [(start_s, end_s) for op, start_s, end_s in spans if op.kind == BACKWARD]
        if not backwards:
            turns_s = [end_s - BACKWARD_SHARE * (end_s - start_s) for start_s, end_s in forwards]
            backwards = [(turn_s, end_s) for turn_s, (_, end_s) in zip(turns_s, forwards, strict=True)]
            forwards = [(start_s, turn_s) for turn_s, (start_s, _) in zip(turns_s, forwards, strict=True)]
        forward.append(Interval(forwards[0][0], forwards[-1][1]))
        backward.append(Interval(backwards[0][0], backwards[-1][1]))
    work = sum(microbatches[1:], microbatches[0])
    return Alone(costs, work, tuple(forward), tuple(backward), _idle_of(forward))


def forecast_inference(prediction: Prediction, alone: Alone, now_s: float) -> Forecast:
    """Forecast a request: it waits for the op in progress where it comes, and for inference ahead of it.

    It does not wait for training that waits itself (`slo_first`).
    """
    if prediction.is_idle:
        return alone.at(now_s)
    if prediction.slot_s > now_s + alone.costs.hop_s:
        return _forecast_without_slot(prediction, alone, now_s)
    forward = []
    start_s = delay_s = now_s
    idle_s = 0.0
    for stage, (alone_start_s, alone_end_s) in enumerate(alone.forward):
        start_s = prediction.turn_of_iteration(stage, alone_start_s + delay_s, start_s)
        delay_s = start_s - alone_start_s
        forward.append(Interval(start_s, alone_end_s + delay_s))
        idle_s += max(0.0, start_s - max(prediction.stage_ends_s[stage], now_s))
    return Forecast(tuple(forward), (), idle_s)


def _forecast_without_slot(prediction: Prediction, alone: Alone, now_s: float) -> Forecast:
    """Forecast without a free slot: the next iteration takes all that wait, and its share of decodes."""
    hop_s, known = alone.costs.hop_s, prediction.known
    room = alone.costs.max_iteration_tokens - alone.work.num_tokens
    joined = prediction.joinable(now_s + hop_s, room)
    durations_s = alone.durations_with(known.joins if joined is None else joined.iteration.work)
    start_s = at_s = max(now_s + hop_s, prediction.slot_s if joined is None else now_s)
    forward, idle_s = [], 0.0
    for stage, duration_s in enumerate(durations_s):
        if joined is not None:
            start_s = max(at_s, joined.starts_s[stage])
        else:
            start_s = prediction.turn_of_iteration(stage, at_s, start_s)
        at_s = start_s + duration_s + known.hop_between_s(stage, min(stage + 1, len(durations_s) - 1))
        forward.append(Interval(start_s, start_s + duration_s))
        idle_s += max(0.0, start_s - max(prediction.stage_ends_s[stage], now_s))
    return Forecast(tuple(forward), (), idle_s)


def forecast_training(prediction: Prediction, alone: Alone, now_s: float) -> Forecast:
    """Forecast a batch: an op runs when its stage has nothing else to do, after earlier batches."""
    if prediction.is_idle and prediction.feed_s <= now_s:
        return alone.at(now_s)
    last = len(alone.forward) - 1
    delay_s, idle_s = max(now_s, prediction.feed_s - alone.forward[0].start_s), 0.0
    forward, backward = [], []
    for stage, (alone_start_s, alone_end_s) in enumerate(alone.forward):
        start_s = _after_decodes(prediction, stage, prediction.first_idle(stage, alone_start_s + delay_s))
        delay_s = start_s - alone_start_s
        forward.append(Interval(start_s, alone_end_s + delay_s))
        idle_s += max(0.0, start_s - max(prediction.stage_ends_s[stage], now_s))
    for stage in range(last, -1, -1):
        alone_start_s, alone_end_s = alone.backward[stage]
        if stage < last:
            start_s = _after_decodes(prediction, stage, prediction.first_idle(stage, alone_start_s + delay_s))
            delay_s = start_s - alone_start_s
        backward.append(Interval(alone_start_s + delay_s, alone_end_s + delay_s))
    return Forecast(tuple(forward), tuple(reversed(backward)), idle_s)


def _after_decodes(prediction: Prediction, stage: int, at_s: float) -> float:
    known = prediction.known
    if known.decode_gap_s and at_s < known.decode_until_s:
        return at_s + known.decode_gap_s[known.devices[stage] if known.devices else stage]
    return at_s


def _num_stages(costs: Costs) -> int:
    assert costs.num_stages is not None, "nodes are known before tasks are placed on them"
    return costs.num_stages


def _idle_of(forward: Sequence[Interval]) -> float:
    return sum(interval.start_s for interval in forward)


def _span(starts_s: Sequence[float], ends_s: Sequence[float]) -> Interval:
    return Interval(starts_s[0], ends_s[-1])


def _shifted(intervals: tuple[Interval, ...], by_s: float) -> tuple[Interval, ...]:
    return tuple([Interval(start_s + by_s, end_s + by_s) for start_s, end_s in intervals])
