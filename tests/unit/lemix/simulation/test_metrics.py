"""Every metric on records made by hand; the expected values are worked out in the comments."""

from dataclasses import fields
from pathlib import Path

import pytest

from lemix.simulation.metrics import RunMetrics, metrics_of
from lemix.simulation.record import BatchRecord, Op, OpLog, RequestRecord, RunRecord
from shared.messages.events import OpKind


def request(
    arrived_s: float, *token_times_s: float, error: str = "", ended_s: float | None = None
) -> RequestRecord:
    return RequestRecord(
        arrived_s=arrived_s,
        lengths=(10,),
        ended_s=token_times_s[-1] if ended_s is None else ended_s,
        nodes=(0,),
        token_times_s=(token_times_s,),
        error=error,
    )


def batch(num_tokens: int, applied_s: float | None) -> BatchRecord:
    return BatchRecord(published_s=0.0, num_tokens=num_tokens, applied_s=applied_s, node=0)


def ops(*rows: tuple[int, int, OpKind, float, float]) -> OpLog:
    log = OpLog()
    for node, stage, kind, start_s, end_s in rows:
        log.append(Op(node, stage, kind, start_s, end_s, 10))
    return log


def record(
    *requests: RequestRecord,
    batches: tuple[BatchRecord, ...] = (),
    log: OpLog | None = None,
    num_nodes: int = 2,
    num_stages: int = 2,
    ended_s: float = 10.0,
) -> RunRecord:
    return RunRecord(
        num_nodes=num_nodes,
        num_stages=num_stages,
        ended_s=ended_s,
        requests=requests,
        batches=batches,
        ops=log or OpLog(),
    )


TWO_NODES = ops(
    # node 0 works from 1 to 5, stage 0 for 2 s of [1, 4] and stage 1 for 3 s of [2, 5]
    (0, 0, "iteration", 1.0, 2.0),
    (0, 1, "iteration", 2.0, 3.0),
    (0, 0, "backward", 3.0, 4.0),
    (0, 1, "forward", 3.0, 5.0),
    # node 2 works from 4 to 6, stage 0 alone
    (2, 0, "forward", 4.0, 6.0),
)


def test_every_metric_is_defined_in_the_document() -> None:
    document = (Path(__file__).parents[4] / "docs" / "metrics.md").read_text()
    assert [each.name for each in fields(RunMetrics) if f"`{each.name}`" not in document] == []


def test_tasks_per_node_second_divides_by_the_time_of_the_nodes_that_worked() -> None:
    run = record(request(0.0, 1.0), request(0.0, 2.0), batches=(batch(5, 3.0),), log=TWO_NODES)
    metrics = metrics_of(run, slo_s=1.0)
    # 4 s of node 0 and 2 s of node 2; two requests and one batch are done
    assert metrics.node_seconds == 6.0
    assert metrics.tasks_per_node_s == pytest.approx(3 / 6)
    assert metrics.nodes_used == 2


def test_what_was_not_done_is_no_throughput() -> None:
    run = record(request(0.0, 1.0), request(0.0, 2.0, error="lost"), batches=(batch(5, None),), log=TWO_NODES)
    assert metrics_of(run, slo_s=1.0).tasks_per_node_s == pytest.approx(1 / 6)


def test_attainment_is_of_all_requests_sent() -> None:
    run = record(
        request(0.0, 0.9),  # within 1 s
        request(2.0, 3.0),  # within, to the point
        request(4.0, 5.5),  # late
        request(5.0, 5.5, error="the node was lost"),  # began in time, but has no full answer
        request(6.0, error="refused", ended_s=6.0),
    )
    metrics = metrics_of(run, slo_s=1.0)
    assert metrics.slo_attainment == pytest.approx(2 / 5)
    assert (metrics.num_requests, metrics.num_answered, metrics.num_failed) == (5, 3, 2)


def test_goodput_is_per_second_of_serving() -> None:
    """The training that goes on until 10 s does not dilute it."""
    run = record(request(0.0, 0.5), request(1.0, 3.0), request(3.0, 4.0), batches=(batch(5, 10.0),))
    assert metrics_of(run, slo_s=1.0).goodput_per_s == pytest.approx(2 / 4.0)


def test_ttft_counts_from_arrival_and_tbt_between_tokens() -> None:
    run = record(request(1.0, 1.5, 1.6, 2.0), request(2.0, 2.1, 2.4), request(0.0, error="no", ended_s=9.0))
    metrics = metrics_of(run, slo_s=1.0)
    assert metrics.ttft_mean_s == pytest.approx((0.5 + 0.1) / 2)
    assert metrics.ttft_p50_s == pytest.approx(0.1)
    assert metrics.ttft_p99_s == pytest.approx(0.5)
    assert metrics.tbt_mean_s == pytest.approx((0.1 + 0.4 + 0.3) / 3)
    assert metrics.tbt_p50_s == pytest.approx(0.3)
    assert metrics.tbt_p99_s == pytest.approx(0.4)
    assert metrics.response_mean_s == pytest.approx((1.0 + 0.4) / 2)
    assert metrics.response_p99_s == pytest.approx(1.0)


def test_a_request_of_two_sequences_waits_for_both() -> None:
    both = RequestRecord(
        arrived_s=1.0,
        lengths=(3, 4),
        ended_s=4.0,
        nodes=(0, 1),
        token_times_s=((2.0, 2.5), (3.0, 4.0)),
    )
    metrics = metrics_of(record(both), slo_s=1.5)
    assert metrics.ttft_mean_s == pytest.approx(2.0)
    assert metrics.slo_attainment == 0.0
    assert metrics.tbt_mean_s == pytest.approx((0.5 + 1.0) / 2)


def test_training_tokens_count_until_the_last_batch_is_applied() -> None:
    run = record(request(0.0, 9.0), batches=(batch(300, 2.0), batch(100, 4.0)))
    metrics = metrics_of(run, slo_s=1.0)
    assert metrics.training_tokens_per_s == pytest.approx(400 / 4.0)
    assert metrics.batches_applied_share == 1.0


def test_a_batch_that_never_is_applied_slows_training() -> None:
    """Else who applies one batch early and starves the rest would seem quick."""
    run = record(batches=(batch(300, 2.0), batch(100, None)), ended_s=30.0)
    metrics = metrics_of(run, slo_s=1.0)
    assert metrics.training_tokens_per_s == pytest.approx(300 / 30.0)
    assert metrics.batches_applied_share == 0.5


def test_idle_share_is_of_all_devices_all_the_time() -> None:
    metrics = metrics_of(record(log=TWO_NODES, num_nodes=3), slo_s=1.0)
    # from 1 to 6: 5 s of 3 nodes x 2 stages; busy are 2 + 3 + 2 s
    assert metrics.end_to_end_s == 5.0
    assert metrics.idle_share == pytest.approx(1 - 7 / 30)
    assert metrics.idle_share_by_stage == pytest.approx((1 - 4 / 15, 1 - 3 / 15))


def test_bubbles_are_gaps_between_the_ops_of_a_device() -> None:
    # spans: 3 s with a gap of 1, 3 s without, 2 s without
    assert metrics_of(record(log=TWO_NODES), slo_s=1.0).bubble_rate == pytest.approx(1 / 8)


def test_of_an_empty_run_nothing_is_known() -> None:
    metrics = metrics_of(record(), slo_s=1.0)
    assert metrics.slo_attainment is metrics.goodput_per_s is metrics.tasks_per_node_s is None
    assert metrics.ttft_mean_s is metrics.tbt_mean_s is metrics.training_tokens_per_s is None
    assert metrics.idle_share is metrics.bubble_rate is None
    assert (metrics.nodes_used, metrics.node_seconds, metrics.end_to_end_s) == (0, 0.0, 0.0)
