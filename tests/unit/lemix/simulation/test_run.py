"""Whole simulated runs, small ones, looked at from outside."""

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest

from lemix.simulation.cluster import SimulationOptions, simulated_cluster
from lemix.simulation.drive import DriveOptions, drive
from lemix.simulation.loop import run_virtual
from lemix.simulation.metrics import RunMetrics
from lemix.simulation.record import RunRecord, event_lines
from lemix.simulation.run import planned, simulate, slo_s
from lemix.simulation.workload import (
    PlannedBatch,
    PlannedRequest,
    Workload,
    WorkloadOptions,
)
from services.scheduler.objectives import Objectives
from shared.profiles.profile import stage_times
from shared.profiles.times import work_of_rows

PROFILE = "gpt2-small@rtx6000ada"
HOP_S = 0.0005
CLUSTER = SimulationOptions(
    nodes=2,
    stages=2,
    profile=PROFILE,
    policy="round_robin",
    hop_s=HOP_S,
    trainer_settings={"microbatches": 2},
)
WORKLOAD = WorkloadOptions(num_tasks=30, rate_per_s=40.0, batch_size=3)


@pytest.fixture(scope="module")
def ran() -> tuple[RunRecord, RunMetrics]:
    return simulate(CLUSTER, WORKLOAD)


def run(workload: Workload, *, training_timeout_s: float = 100.0) -> RunRecord:
    async def main() -> RunRecord:
        async with simulated_cluster(CLUSTER) as world:
            options = DriveOptions(schedule="async", microbatches=2, training_timeout_s=training_timeout_s)
            return await drive(world, workload, options)

    return run_virtual(main())


def test_the_same_seed_gives_the_same_log_byte_for_byte(ran: tuple[RunRecord, RunMetrics]) -> None:
    again, metrics = simulate(CLUSTER, WORKLOAD)
    assert "".join(event_lines(again)) == "".join(event_lines(ran[0]))
    assert metrics == ran[1]
    other, _ = simulate(replace(CLUSTER, seed=1), WORKLOAD)
    assert "".join(event_lines(other)) != "".join(event_lines(ran[0]))


def test_everything_that_was_planned_is_done(ran: tuple[RunRecord, RunMetrics]) -> None:
    record, metrics = ran
    workload = planned(WORKLOAD, CLUSTER.seed)
    assert [request.lengths for request in record.requests] == [r.lengths for r in workload.requests]
    assert [r.arrived_s for r in record.requests] == pytest.approx([r.at_s for r in workload.requests])
    assert [batch.num_tokens for batch in record.batches] == [sum(b.lengths) for b in workload.batches]
    assert (metrics.num_answered, metrics.num_requests, metrics.batches_applied_share) == (15, 15, 1.0)
    assert metrics.num_failed == 0


def test_what_stages_did_adds_up_to_what_was_asked(ran: tuple[RunRecord, RunMetrics]) -> None:
    record, _ = ran
    tokens: defaultdict[tuple[int, str], int] = defaultdict(int)
    for op in record.ops:
        tokens[op.stage, op.kind] += op.num_tokens
    asked = sum(sum(request.lengths) for request in record.requests)
    trained = sum(batch.num_tokens for batch in record.batches)
    for stage in range(2):
        assert tokens[stage, "iteration"] == asked
        assert tokens[stage, "forward"] == trained
    assert tokens[0, "backward"] == trained
    assert sum(op.kind == "step" for op in record.ops) == 2 * len(record.batches)


def test_a_stage_does_one_thing_at_a_time(ran: tuple[RunRecord, RunMetrics]) -> None:
    by_stage = defaultdict(list)
    for op in ran[0].ops:
        by_stage[op.node, op.stage].append(op)
    assert len(by_stage) == 4
    for ops in by_stage.values():
        within = {
            op: [other for other in ops if op.start_s < other.start_s and other.end_s < op.end_s]
            for op in ops
        }
        gave_way = [op for op in ops if op.given_way_s]
        for op in gave_way:
            assert op.kind != "iteration" and {other.kind for other in within[op]} == {"iteration"}
            assert op.given_way_s == pytest.approx(sum(other.end_s - other.start_s for other in within[op]))
        inner = {other for op in gave_way for other in within[op]}
        outer = sorted((op.start_s, op.end_s) for op in ops if op not in inner)
        assert all(later >= end - 1e-9 for (_, end), (later, _) in pairwise(outer))


def test_a_lone_request_takes_its_stages_and_four_hops() -> None:
    """gateway -> scheduler -> stage 0 -> stage 1 -> gateway."""
    record = run(Workload(requests=(PlannedRequest(0.5, (200,), 1),), batches=(), release="all"))
    (request,) = record.requests
    stages_s = [stage_times(PROFILE, stage, 2).iteration_s(work_of_rows(0, 200)) for stage in range(2)]
    assert request.arrived_s == pytest.approx(0.5)
    assert request.ended_s - request.arrived_s == pytest.approx(sum(stages_s) + 4 * HOP_S, rel=1e-3)
    assert [op.end_s - op.start_s for op in record.ops] == pytest.approx(stages_s)
    assert request.nodes == (0,)


def test_a_generating_request_has_all_its_tokens() -> None:
    record = run(Workload(requests=(PlannedRequest(0.0, (20, 30), 5),), batches=(), release="all"))
    (request,) = record.requests
    assert [len(times_s) for times_s in request.token_times_s] == [5, 5]
    assert all(later > earlier for times_s in request.token_times_s for earlier, later in pairwise(times_s))
    assert set(request.nodes) == {0, 1}


def test_a_refused_request_is_recorded_with_the_reason() -> None:
    too_long = PlannedRequest(0.0, (5_000,), 1)
    record = run(Workload(requests=(too_long, PlannedRequest(0.0, (50,), 1)), batches=(), release="all"))
    refused, answered = record.requests
    assert "5001 tokens" in refused.error and refused.first_token_s is None
    assert answered.error == "" and answered.first_token_s is not None


def batches_of(count: int) -> tuple[PlannedBatch, ...]:
    return tuple(PlannedBatch((100 + 10 * i, 100)) for i in range(count))


def test_closed_release_waits_for_both_microbatches_to_pass_the_first_stage() -> None:
    record = run(Workload(requests=(), batches=batches_of(6), release="closed"))
    passed_s = sorted(op.end_s for op in record.ops if (op.stage, op.kind) == (0, "forward"))
    # what a stage says of its forward takes the same hop as what it says to the trainer
    assert [batch.published_s for batch in record.batches[1:]] == pytest.approx(passed_s[1:-2:2])
    for earlier, later in pairwise(record.batches):
        assert earlier.applied_s is not None and later.published_s < earlier.applied_s


def test_closed_release_of_the_synchronous_schedule_waits_for_the_step() -> None:
    record, _ = simulate(replace(CLUSTER, schedule="1f1b"), replace(WORKLOAD, num_tasks=6, training_rate=1.0))
    for earlier, later in pairwise(record.batches):
        assert later.published_s == pytest.approx(earlier.applied_s)


def test_all_batches_can_be_released_at_once_or_at_their_times() -> None:
    record = run(Workload(requests=(), batches=batches_of(6), release="all"))
    assert {batch.published_s for batch in record.batches} == {0.0}
    timed = tuple(PlannedBatch((100,), at_s) for at_s in (0.25, 0.5))
    record = run(Workload(requests=(), batches=timed, release="poisson"))
    assert [batch.published_s for batch in record.batches] == pytest.approx([0.25, 0.5])


def test_training_that_takes_too_long_is_cut_off() -> None:
    """What was published and not applied stays in the record."""
    record = run(Workload(requests=(), batches=batches_of(6), release="all"), training_timeout_s=0.005)
    applied = [batch.applied_s is not None for batch in record.batches]
    assert len(applied) == 6 and not all(applied)
    assert record.ended_s < 0.1


def test_the_objective_does_not_depend_on_the_policy() -> None:
    objective_s = slo_s(CLUSTER)
    assert slo_s(replace(CLUSTER, policy="random", nodes=7)) == objective_s
    assert slo_s(replace(CLUSTER, objectives=Objectives(slo_factor=10.0))) == pytest.approx(2 * objective_s)
    alone_s = sum(stage_times(PROFILE, stage, 2).iteration_s(work_of_rows(0, 150)) for stage in range(2))
    assert objective_s == pytest.approx(5 * alone_s, rel=0.05)
