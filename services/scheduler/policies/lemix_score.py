"""Which of several nodes suits a task best: LeMix's score, and the paper's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.scheduler.forecast import Forecast
from services.scheduler.policies.candidates import Candidate
from services.scheduler.policies.lemix_options import LemixOptions
from services.scheduler.policies.released_score import gaussian_density

INACTIVE = 1.0
"""The cost of opening a node: more than all else together, so that it is the last resort."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """A task on a node, with its forecast."""

    candidate: Candidate
    forecast: Forecast
    duration_s: float
    """From now to the first token, or to the end of the training task's last backward."""
    exposure_s: float = 0.0
    """Time that unforeseen training there may add to a request: one op on each stage after the first."""

    @property
    def node(self) -> int:
        return self.candidate.node


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The limits and units for judging the prospects."""

    length: int
    """Tokens of the task."""
    limit_s: float
    """A node whose duration is within it will do; the fastest always will."""
    opening_s: float
    """While an active node's duration is within it, no node is opened."""
    unit_s: float
    """The unit of durations: the objective, or the fastest node's duration."""
    slo_s: float
    now_s: float


def ranked(prospects: Sequence[Prospect], question: Question, options: LemixOptions) -> list[Prospect]:
    """The nodes that will do, the best first; of equals, the lowest id first."""
    if options.score == "paper":
        return sorted(prospects, key=lambda prospect: -paper_score(prospect, question, options))
    active = [prospect for prospect in prospects if prospect.candidate.is_active]
    will_do = _within(question.limit_s, prospects)
    if options.has("consolidation"):
        will_do = _within(question.limit_s, active) or _within(question.opening_s, active) or will_do
    will_do = will_do or _within(min(prospect.duration_s for prospect in prospects), prospects)
    return sorted(will_do, key=lambda prospect: cost(prospect, question, options))


def _within(limit_s: float, prospects: Sequence[Prospect]) -> list[Prospect]:
    return [prospect for prospect in prospects if prospect.duration_s <= limit_s]


def cost(prospect: Prospect, question: Question, options: LemixOptions) -> float:
    """Response time, idleness, consolidation and length consistency in one number; the less the better.

    (duration + v * exposure) / unit + w * min(1, idle / SLO) + [inactive] - beta * exp(-z^2 / 2), where idle
    is the time that a stage stands still in front of the task (mean over stages), the node's own included.
    """
    candidate, lengths = prospect.candidate, prospect.candidate.node_model.lengths
    value = (prospect.duration_s + options.exposure * prospect.exposure_s) / question.unit_s
    if options.has("idleness"):
        idle_s = candidate.idle_s + prospect.forecast.idle_s / len(prospect.forecast.forward)
        value += options.idleness * min(1.0, idle_s / question.slo_s)
    if options.has("consolidation") and not candidate.is_active:
        value += INACTIVE
    if options.has("consistency"):
        value -= options.beta * likeness(question.length, lengths.mean, lengths.std)
    return value


def likeness(length: int, mean: float, std: float) -> float:
    """The density over its greatest value: 1 for the mean length of a node's tasks, less for others."""
    return math.exp(-(((length - mean) / std) ** 2) / 2) if std > 0 else 0.0


def paper_score(prospect: Prospect, question: Question, options: LemixOptions) -> float:
    """(IP + beta * LC) / (alpha * RT), the greater the better, as the paper has it; forecasts are ours.

    The idleness profit IP is -max(II / S - gap, epsilon) and never positive: of two nodes with equal idle
    time it prefers the slower one.
    """
    node_model, forecast = prospect.candidate.node_model, prospect.forecast
    last_s, lengths = node_model.last_arrival_s, node_model.lengths
    gap_s = 0.0 if last_s is None else question.now_s - last_s
    idle_s = forecast.idle_s if options.has("idleness") else 0.0
    profit = -max(idle_s / len(forecast.forward) - gap_s, options.epsilon)
    is_weighed = options.has("consistency")
    density = gaussian_density(question.length, lengths.mean, lengths.std) if is_weighed else 0.0
    return (profit + options.beta * density) / (options.alpha * (forecast.end_s - question.now_s))
