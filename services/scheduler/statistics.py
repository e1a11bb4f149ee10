"""Running statistics for the scheduler, each in constant time and memory."""

import math
from dataclasses import dataclass

RATE_WINDOW_S = 10.0
"""Arrivals count the less the older they are: after so long, 1/e."""


@dataclass(slots=True)
class RunningMoments:
    """Mean and standard deviation of everything added so far (Welford's algorithm)."""

    count: int = 0
    mean: float = 0.0
    _squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        before = value - self.mean
        self.mean += before / self.count
        self._squares += before * (value - self.mean)

    @property
    def std(self) -> float:
        """Standard deviation of the population; 0 without values."""
        return math.sqrt(self._squares / self.count) if self.count else 0.0


@dataclass(slots=True)
class ArrivalRate:
    """Arrivals per second, newer ones weighing more (exponentially, RATE_WINDOW_S).

    What arrives may be more or less than one: seconds of work, for one.
    """

    _weight: float = 0.0
    _last_s: float = 0.0
    _first_s: float | None = None

    def add(self, now_s: float, amount: float = 1.0) -> None:
        """Note an arrival."""
        if self._first_s is None:
            self._first_s = now_s
        self._weight = self._weight_at(now_s) + amount
        self._last_s = now_s

    def per_s(self, now_s: float) -> float:
        """The weighted number over the weighted time since the first; 0 before anything has arrived."""
        if self._first_s is None:
            return 0.0
        seen = RATE_WINDOW_S * -math.expm1(-(now_s - self._first_s) / RATE_WINDOW_S)
        return self._weight_at(now_s) / max(seen, 1.0)

    def _weight_at(self, now_s: float) -> float:
        return self._weight * math.exp((self._last_s - now_s) / RATE_WINDOW_S)


@dataclass(slots=True)
class MeanError:
    """Mean absolute error of predictions, relative to what happened (MAPE / 100)."""

    count: int = 0
    total: float = 0.0

    def add(self, predicted: float, actual: float) -> None:
        """Add a prediction; one whose `actual` is not positive says nothing, and is left out."""
        if actual > 0:
            self.count += 1
            self.total += abs(predicted - actual) / actual

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


LATE_SHARE = 0.05
"""So many of the requests may turn out late that were placed as being in time."""
MARGIN_STEP = 0.02
MAX_MARGIN = 0.4


@dataclass(slots=True)
class LateMargin:
    """The part of its objective that a forecast must leave free, so that hardly any request turns out late.

    Grows with each that is late, and shrinks with each that is not, until LATE_SHARE of them are.
    """

    share: float = 0.0

    def add(self, *, is_late: bool) -> None:
        """Note how a request turned out that was placed as being in time."""
        change = MARGIN_STEP * (1 - LATE_SHARE if is_late else -LATE_SHARE)
        self.share = min(max(self.share + change, 0.0), MAX_MARGIN)
