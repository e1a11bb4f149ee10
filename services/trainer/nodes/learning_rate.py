"""The learning rate by a batch's place in the run: the same on every node and after a restart."""

from dataclasses import dataclass
from math import cos, pi
from typing import Literal

Decay = Literal["constant", "linear", "cosine"]


GENTLEST, BOLDEST = 7.5e-6, 1e-3
RATE_TIMES_WEIGHTS = 7.5e-6 * 135e6
"""At 7.5e-6 a chat model of 135 million weights learns a fact in 40 steps, and loses nothing else."""
OF_ADAPTER = 10
"""An adapter stands so many times the rate of all weights."""
SUITABLE_WARMUP_BATCHES = 8


def suitable_rate(num_weights: int | None, *, is_adapter: bool) -> float:
    """A rate at which a model of that size learns without losing what it knew; None: the boldest."""
    if num_weights is None:
        return BOLDEST
    of_all = max(GENTLEST, RATE_TIMES_WEIGHTS / num_weights)
    return min(BOLDEST, of_all * (OF_ADAPTER if is_adapter else 1))


def suitable_warmup(num_batches: int) -> int:
    """Batches of warm-up before a rate that nobody has chosen; `num_batches`: until it has fallen, or 0."""
    return min(SUITABLE_WARMUP_BATCHES, num_batches - 1) if num_batches else SUITABLE_WARMUP_BATCHES


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRate:
    """Rises linearly over the warm-up, then falls as `decay` says to `final`, and stays there."""

    peak: float
    decay: Decay = "constant"
    warmup_batches: int = 0
    num_batches: int = 0
    """Where the fall ends."""
    final: float = 0.0

    def at(self, number: int) -> float:
        """The rate of the batch that has `number` others before it in the run."""
        if number < self.warmup_batches:
            return self.peak * (number + 1) / self.warmup_batches
        if self.decay == "constant":
            return self.peak
        passed = (number - self.warmup_batches) / (self.num_batches - self.warmup_batches)
        return self.final + (self.peak - self.final) * self._left(min(passed, 1.0))

    def _left(self, passed: float) -> float:
        """Share of the fall that is still to come."""
        return 1 - passed if self.decay == "linear" else (1 + cos(pi * passed)) / 2
