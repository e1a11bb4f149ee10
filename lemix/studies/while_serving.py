"""Numbers of a run for the time while requests arrived: later ends do not count. Pure."""

from lemix.simulation.metrics import RunMetrics
from lemix.simulation.record import RunRecord
from lemix.studies.rows import Metrics

IN_TIME_PER_S = "in_time_per_s"
KEPT = "training_kept"
UNDER_WAY = 0.1
"""Batches that came in this last share of the time may be under way at its end: they do not count as kept or
lost.
"""
TRAINED_PER_S = "training_tokens_while_serving_per_s"


def while_serving(record: RunRecord, metrics: RunMetrics) -> Metrics:
    """Requests in time per second, the share of the training that came and was applied, and its tokens per
    second.
    """
    until_s = record.requests[-1].arrived_s
    applied = [
        batch for batch in record.batches if batch.applied_s is not None and batch.applied_s <= until_s
    ]
    early_s = (1 - UNDER_WAY) * until_s
    came = sum(batch.num_tokens for batch in record.batches if batch.published_s <= early_s)
    kept = sum(batch.num_tokens for batch in applied if batch.published_s <= early_s)
    num_in_time = (metrics.slo_attainment or 0.0) * metrics.num_requests
    return {
        IN_TIME_PER_S: num_in_time / until_s if until_s else None,
        KEPT: kept / came if came else None,
        TRAINED_PER_S: sum(batch.num_tokens for batch in applied) / until_s if until_s else None,
    }
