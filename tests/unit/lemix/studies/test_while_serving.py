"""Numbers of the time while requests arrive, on a run that is written out."""

import pytest

from lemix.simulation.metrics import metrics_of
from lemix.simulation.record import BatchRecord, RequestRecord, RunRecord
from lemix.studies.overload import near_the_bound, near_the_most
from lemix.studies.rows import Row, Spread
from lemix.studies.while_serving import while_serving


def request(arrived_s: float, answered_s: float) -> RequestRecord:
    return RequestRecord(
        arrived_s=arrived_s, lengths=(8,), ended_s=answered_s, nodes=(0,), token_times_s=((answered_s,),)
    )


def batch(published_s: float, applied_s: float | None, num_tokens: int) -> BatchRecord:
    return BatchRecord(published_s=published_s, num_tokens=num_tokens, applied_s=applied_s, node=0)


def test_only_what_ends_while_requests_arrive_counts() -> None:
    record = RunRecord(
        num_nodes=1,
        num_stages=1,
        ended_s=9.0,
        requests=(request(0.0, 0.5), request(1.0, 3.0), request(4.0, 4.5)),
        batches=(
            batch(0.0, 2.0, 100),
            batch(1.0, 5.0, 300),
            batch(2.0, None, 600),
            batch(3.7, None, 900),
            batch(6.0, 7.0, 50),
        ),
    )
    numbers = while_serving(record, metrics_of(record, slo_s=1.0))
    assert numbers["in_time_per_s"] == pytest.approx(2 / 4)
    assert numbers["training_kept"] == pytest.approx(100 / 1_000), "what came after 3.6 s may be under way"
    assert numbers["training_tokens_while_serving_per_s"] == pytest.approx(100 / 4)


def test_without_training_nothing_is_kept_or_lost() -> None:
    record = RunRecord(num_nodes=1, num_stages=1, ended_s=2.0, requests=(request(1.0, 1.5),), batches=())
    assert while_serving(record, metrics_of(record, slo_s=1.0))["training_kept"] is None


def overload_rows() -> list[Row]:
    def row(policy: str, factor: float, in_time_per_s: float) -> Row:
        metrics = {"in_time_per_s": Spread(in_time_per_s, in_time_per_s, in_time_per_s)}
        return Row({"factor": factor, "policy": policy}, metrics, 5)

    return [
        *(row("lemix", 1, 50.0), row("round_robin", 1, 50.0), row("bound", 1, 100.0)),
        *(row("lemix", 2, 89.0), row("round_robin", 2, 100.0), row("bound", 2, 100.0)),
        *(row("lemix", 5, 90.0), row("round_robin", 5, 9.0), row("bound", 5, 200.0)),
    ]


def test_overload_is_held_against_the_most_of_any_policy_and_no_more_than_could_be_in_time() -> None:
    findings = near_the_most(overload_rows()).findings
    assert [(finding.labels["factor"], finding.met) for finding in findings] == [(2, False), (5, True)]
    assert [finding.needed for finding in findings] == [90.0, 90.0]


def test_overload_is_held_against_the_bound_above_capacity_alone() -> None:
    findings = near_the_bound(overload_rows()).findings
    assert [(finding.labels["factor"], finding.met) for finding in findings] == [(2, False), (5, False)]
    assert [finding.needed for finding in findings] == [90.0, 180.0]
