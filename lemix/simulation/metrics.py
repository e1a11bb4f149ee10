"""The metrics of a run. Pure; docs/metrics.md defines each number."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

from lemix.simulation.record import Op, RequestRecord, RunRecord
from lemix.summary import percentile


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMetrics:
    """Times in seconds; None where nothing was measured."""

    num_requests: int
    num_answered: int
    num_failed: int
    num_batches: int
    batches_applied_share: float | None

    tasks_per_node_s: float | None
    """The paper's throughput."""
    goodput_per_s: float | None
    slo_s: float
    slo_attainment: float | None
    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tbt_mean_s: float | None
    tbt_p50_s: float | None
    tbt_p99_s: float | None
    response_mean_s: float | None
    response_p99_s: float | None

    training_tokens_per_s: float | None

    nodes_used: int
    node_seconds: float
    end_to_end_s: float
    idle_share: float | None
    idle_share_by_stage: tuple[float, ...]
    bubble_rate: float | None

    forward_error: float | None
    response_error: float | None


def metrics_of(
    record: RunRecord, *, slo_s: float, objective_s: Callable[[int], float] | None = None
) -> RunMetrics:
    """Measure a run.

    A request keeps the objective when its first token came in time: within `objective_s` of the length of its
    longest prompt (None: within `slo_s`, the objective of a prompt of mean length).
    """
    objective_s = objective_s or (lambda length: slo_s)
    answered = [request for request in record.requests if not request.error]
    num_within = sum(_is_within(request, objective_s(max(request.lengths))) for request in record.requests)
    ttfts_s = [ttft_s for request in answered if (ttft_s := _ttft_s(request)) is not None]
    tbts_s = [gap_s for request in answered for gap_s in _gaps_s(request)]
    responses_s = [request.ended_s - request.arrived_s for request in answered]
    applied = [batch for batch in record.batches if batch.applied_s is not None]
    use = DeviceUse.of(record)
    return RunMetrics(
        num_requests=len(record.requests),
        num_answered=len(answered),
        num_failed=len(record.requests) - len(answered),
        num_batches=len(record.batches),
        batches_applied_share=_ratio(len(applied), len(record.batches)),
        tasks_per_node_s=_ratio(len(answered) + len(applied), use.node_seconds),
        goodput_per_s=_ratio(num_within, max((request.ended_s for request in record.requests), default=0.0)),
        slo_s=slo_s,
        slo_attainment=_ratio(num_within, len(record.requests)),
        ttft_mean_s=_mean(ttfts_s),
        ttft_p50_s=percentile(ttfts_s, 0.50),
        ttft_p99_s=percentile(ttfts_s, 0.99),
        tbt_mean_s=_mean(tbts_s),
        tbt_p50_s=percentile(tbts_s, 0.50),
        tbt_p99_s=percentile(tbts_s, 0.99),
        response_mean_s=_mean(responses_s),
        response_p99_s=percentile(responses_s, 0.99),
        training_tokens_per_s=_ratio(sum(batch.num_tokens for batch in applied), _training_s(record)),
        nodes_used=len(use.by_node),
        node_seconds=use.node_seconds,
        end_to_end_s=use.span.length_s,
        idle_share=use.idle_share(record.num_nodes, range(record.num_stages)),
        idle_share_by_stage=use.idle_share_by_stage(record.num_nodes, record.num_stages),
        bubble_rate=use.bubble_rate,
        forward_error=record.forward_error,
        response_error=record.response_error,
    )


def _ttft_s(request: RequestRecord) -> float | None:
    first_s = request.first_token_s
    return None if first_s is None else first_s - request.arrived_s


def _is_within(request: RequestRecord, slo_s: float) -> bool:
    """A request without its full answer has missed the objective, whenever its first token came."""
    ttft_s = _ttft_s(request)
    return not request.error and ttft_s is not None and ttft_s <= slo_s


def _training_s(record: RunRecord) -> float:
    """Until the last batch was applied; until the end when one never was."""
    ends_s = (record.ended_s if batch.applied_s is None else batch.applied_s for batch in record.batches)
    return max(ends_s, default=0.0)


def _gaps_s(request: RequestRecord) -> Iterable[float]:
    return (later - earlier for times_s in request.token_times_s for earlier, later in pairwise(times_s))


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _ratio(amount: float, total: float) -> float | None:
    return amount / total if total > 0 else None


@dataclass(slots=True)
class Span:
    """The time from the first start of some ops to their last end, and how much of it they filled."""

    start_s: float = float("inf")
    end_s: float = float("-inf")
    busy_s: float = 0.0

    def add(self, op: Op) -> None:
        self.start_s = min(self.start_s, op.start_s)
        self.end_s = max(self.end_s, op.end_s)
        self.busy_s += op.device_s

    @property
    def length_s(self) -> float:
        return max(0.0, self.end_s - self.start_s)


@dataclass(slots=True)
class DeviceUse:
    """When devices worked. Ops of one stage never overlap, so that their lengths add up."""

    span: Span = field(default_factory=Span)
    by_node: dict[int, Span] = field(default_factory=dict)
    by_device: dict[tuple[int, int], Span] = field(default_factory=dict)
    """By (node, stage)."""

    @classmethod
    def of(cls, record: RunRecord) -> "DeviceUse":
        use = cls()
        for op in record.ops:
            use.span.add(op)
            use.by_node.setdefault(op.node, Span()).add(op)
            use.by_device.setdefault((op.node, op.stage), Span()).add(op)
        return use

    @property
    def node_seconds(self) -> float:
        return sum(span.length_s for span in self.by_node.values())

    @property
    def bubble_rate(self) -> float | None:
        spans_s = sum(span.length_s for span in self.by_device.values())
        busy_s = sum(span.busy_s for span in self.by_device.values())
        return _ratio(spans_s - busy_s, spans_s)

    def idle_share(self, num_nodes: int, stages: Sequence[int]) -> float | None:
        """Idle share of these stages' devices on all nodes, unused nodes included, over the whole run."""
        busy_s = sum(span.busy_s for (_, stage), span in self.by_device.items() if stage in stages)
        available_s = self.span.length_s * num_nodes * len(stages)
        return _ratio(available_s - busy_s, available_s)

    def idle_share_by_stage(self, num_nodes: int, num_stages: int) -> tuple[float, ...]:
        shares = (self.idle_share(num_nodes, [stage]) for stage in range(num_stages))
        return tuple(share for share in shares if share is not None)
