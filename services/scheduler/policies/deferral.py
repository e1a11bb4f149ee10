"""Whether a training batch should wait, because requests that are expected would miss the objective."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.scheduler.forecast import Forecast
from shared.slices import WHOLE, NumSlices

MIN_RATE_PER_S = 0.05
"""Least rate of requests: where hardly any comes, no batch waits for one."""

Response = Callable[[int, float], float]
"""(node, time) -> response time of an expected request that would come to the node then."""


class OpTimes(NamedTuple):
    """Seconds for which each op of a microbatch holds one stage."""

    forward_s: float
    """On the last stage with its backward."""
    backward_s: float
    step_s: float
    num_slices: NumSlices = WHOLE
    """A request waits for a slice, not for the op."""

    @property
    def all_s(self) -> tuple[float, float, float]:
        return self.forward_s, self.backward_s, self.step_s

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many slices each has."""
        return self.num_slices.of_pass, self.num_slices.of_pass, self.num_slices.of_step

    @property
    def slices_s(self) -> tuple[float, ...]:
        """How long a slice of each is."""
        return tuple(each_s / count for each_s, count in zip(self.all_s, self.counts, strict=True))


@dataclass(frozen=True, slots=True)
class BatchOps:
    """The ops of a batch on each stage."""

    stages: tuple[OpTimes, ...]
    """The times of its largest microbatch."""
    num_microbatches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The requests that may come."""

    response: Response
    nodes: Sequence[int]
    """Where they could go."""
    slo_s: float
    batches_per_s: float
    """How many come to the cluster."""


def late_share(node: int, forecast: Forecast, ops: BatchOps, expected: Expected) -> float:
    """Share of expected requests that would be late on `node` because of the batch, and on every other.

    A request that comes to a stage at the start of a slice of an op waits for all of it; the later it comes,
    the less. So of each slice the first `response + slice - objective` seconds are unsafe. The share is the
    unsafe time of a batch times the batches per second.
    """
    unsafe_s = 0.0
    for stage, durations_s in enumerate(ops.stages):
        at_s = _start_of_longest_s(forecast, stage, durations_s)
        spare_s = expected.slo_s - expected.response(node, at_s)
        if spare_s < max(durations_s.slices_s) and not _is_safe_elsewhere(node, at_s, expected):
            unsafe_s += _unsafe_s(durations_s, ops.num_microbatches, spare_s)
    return min(1.0, unsafe_s * expected.batches_per_s)


def safe_again_s(now_s: float, expected: Expected) -> float:
    """The time when the first node would answer in time again, as ops in the way end."""
    return now_s + min(expected.response(node, now_s) for node in expected.nodes) - expected.slo_s


def _start_of_longest_s(forecast: Forecast, stage: int, durations_s: OpTimes) -> float:
    forward, backward = forecast.forward[stage], forecast.backward[stage]
    starts_s = (forward.start_s, backward.start_s, backward.end_s)
    return starts_s[durations_s.slices_s.index(max(durations_s.slices_s))]


def _is_safe_elsewhere(node: int, at_s: float, expected: Expected) -> bool:
    others = (other for other in expected.nodes if other != node)
    return any(expected.response(other, at_s) <= expected.slo_s for other in others)


def _unsafe_s(durations_s: OpTimes, num_microbatches: int, spare_s: float) -> float:
    """The last stage's forward is taken for one pass, though it is two: that errs on the safe side."""
    forward_s, backward_s, step_s = (
        min(each_s, max(0.0, each_s - count * spare_s))
        for each_s, count in zip(durations_s.all_s, durations_s.counts, strict=True)
    )
    return num_microbatches * (forward_s + backward_s) + step_s
