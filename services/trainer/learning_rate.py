"""The learning rate by a batch's place in the run: the same on every node and after a restart."""

from dataclasses import dataclass
from math import cos, pi
from typing import Literal

Decay = Literal["constant", "linear", "cosine"]


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
