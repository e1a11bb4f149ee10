"""Metrics as tables and figures show them."""

from collections.abc import Callable
from dataclasses import dataclass

from lemix.studies.verdicts import APPLIED, SLO, THROUGHPUT, TRAINING
from lemix.studies.while_serving import IN_TIME_PER_S, KEPT, TRAINED_PER_S

Format = Callable[[float], str]


def number(value: float) -> str:
    """Three significant digits, without an exponent where a person would not write one."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.0f}" if abs(value) >= 1_000 else f"{value:#.3g}".rstrip(".")
    return f"{value:.2e}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric, and how a person reads it."""

    metric: str
    title: str
    form: Format = number
    scale: float = 1.0
    """Factor for figures."""


SLO_ATTAINMENT = Measure(SLO, "SLO attainment (%)", percent, 100)
TASKS_PER_NODE_S = Measure(THROUGHPUT, "tasks per node-second")
TRAINING_TOKENS = Measure(TRAINING, "training tokens/s")
IDLE_SHARE = Measure("idle_share", "idle share (%)", percent, 100)
TTFT = Measure("ttft_mean_s", "mean TTFT (s)")
TBT = Measure("tbt_mean_s", "mean TBT (s)")
RESPONSE = Measure("response_mean_s", "mean response (s)")
NODES_USED = Measure("nodes_used", "nodes used")
IN_TIME_RATE = Measure(IN_TIME_PER_S, "requests in time per second")
TRAINING_KEPT = Measure(KEPT, "training kept up with (%)", percent, 100)
TRAINING_WHILE_SERVING = Measure(TRAINED_PER_S, "training tokens/s while requests arrive")
TRAINING_APPLIED = Measure(APPLIED, "training applied in the end (%)", percent, 100)
NOT_ANSWERED = Measure("num_failed", "requests without an answer")
TTFT_P99 = Measure("ttft_p99_s", "TTFT p99 (s)")
TBT_P99 = Measure("tbt_p99_s", "TBT p99 (s)")
FORECAST_ERROR = Measure("response_error", "forecast error of responses (%)", percent, 100)
