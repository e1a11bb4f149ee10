"""The score of the paper's released code, formula for formula.

From pejoule/LeMix at a87f280, `distributed_llm.py` lines 645 to 714, the inverted score and the forecast
that lets a stage start before the stage ahead of it has ended included. Left out is what only goes wrong
there: traces shared between tasks, tasks forgotten while a node is scored, a random score after an error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.scheduler.forecast import Forecast, Interval


@dataclass(frozen=True, slots=True)
class Trained:
    """A training task that lives on the node."""

    backward: Sequence[Interval]
    """By stage."""
    backward_s: float
    """eta_b * b * L^2 of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTrace:
    """The facts about a node that the formula uses."""

    num_stages: int
    last_release_s: float | None = None
    """Release of the task assigned last; None: there was none."""
    last_forward_end_s: Sequence[float] = ()
    """End of the forward of the task assigned last, by stage."""
    training: Sequence[Trained] = ()
    """In the order of their assignment."""
    length_mean: float = 0.0
    length_std: float = 0.0
    """Standard deviation of the assigned tasks' lengths (population); 0 when there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Weights of the terms: the paper's lambda1, lambda2 and tau, with the values of its scripts."""

    alpha: float = 0.15
    beta: float = 0.05
    epsilon: float = 0.2


@dataclass(frozen=True, slots=True)
class Scored:
    """A task on a node."""

    score: float
    response_s: float
    forecast: Forecast


def score(
    trace: NodeTrace,
    weights: Weights,
    *,
    release_s: float,
    length: float,
    forward_s: float,
    backward_s: float,
) -> Scored:
    """(IP + beta * LC) / (alpha * RT). `backward_s`: 0 for inference; both per stage."""
    forecast = released_forecast(trace, release_s=release_s, forward_s=forward_s, backward_s=backward_s)
    gap_s = 0.0 if trace.last_release_s is None else release_s - trace.last_release_s
    response_s = forecast.end_s - release_s
    idleness_profit = -max(forecast.idle_s / trace.num_stages - gap_s, weights.epsilon)
    consistency = gaussian_density(length, trace.length_mean, trace.length_std)
    value = (idleness_profit + weights.beta * consistency) / (weights.alpha * response_s)
    return Scored(value, response_s, forecast)


def released_forecast(trace: NodeTrace, *, release_s: float, forward_s: float, backward_s: float) -> Forecast:
    """A stage's forward starts after the forward of the task before, and after backwards in its way.

    It does not wait for its own forward on the stage ahead to end, only to start.
    """
    forward: list[Interval] = []
    start_s, idle_s, first = release_s, 0.0, 0
    for stage in range(trace.num_stages):
        previous_end_s = trace.last_forward_end_s[stage] if trace.last_forward_end_s else start_s
        start_s = max(previous_end_s, start_s)
        offset_s = 0.0
        for index in range(first, len(trace.training)):
            first = index  # the next stage goes on with the task that this one stopped at
            trained = trace.training[index]
            backward = trained.backward[stage]
            if start_s + forward_s <= backward.start_s:
                break
            start_s = max(start_s, backward.end_s)
            if previous_end_s <= backward.start_s:
                offset_s += trained.backward_s
        forward.append(Interval(start_s, start_s + forward_s))
        idle_s += max(0.0, start_s - previous_end_s - offset_s)
    backwards = _backward(forward[-1].end_s, trace.num_stages, backward_s) if backward_s else ()
    return Forecast(tuple(forward), backwards, idle_s)


def _backward(start_s: float, num_stages: int, backward_s: float) -> tuple[Interval, ...]:
    """Backwards from the last stage to the first without a pause; by stage."""
    starts_s = [start_s + index * backward_s for index in range(num_stages)]
    return tuple(Interval(start, start + backward_s) for start in reversed(starts_s))


def gaussian_density(value: float, mean: float, std: float) -> float:
    """The normal density; 0 when `std` is 0."""
    if std == 0:
        return 0.0
    return math.exp(-(((value - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
