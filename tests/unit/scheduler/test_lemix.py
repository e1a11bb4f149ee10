"""LeMix on hand-drawn pipelines: each part decides something, and decides otherwise when it is off.

Two stages; a token takes a stage 1 ms forward and 2 ms backward, messages take no time; the objective is 1 s.
"""

import copy

import pytest

from services.scheduler.events import RequestsLate, StageProgressed, TasksEnded
from services.scheduler.policies import policy_named, uses_profile
from services.scheduler.policies.base import Place, Policy, Refuse, Wait
from services.scheduler.policies.lemix import YIELDING
from services.scheduler.policies.lemix_options import BUSY_LOAD, CALM_LOAD, LemixOptions
from services.scheduler.policies.memory import TrainingRoom
from services.scheduler.state import ClusterState
from shared.messages.events import OpEnded, StageOp, StageProgress
from tests.support.policies import (
    SLO_S,
    LinearCosts,
    ask,
    assign,
    batch,
    cluster,
    request,
    start_forward,
    submit,
)


def lemix(options: str = "", room: TrainingRoom | None = None) -> Policy:
    return policy_named(f"lemix:{options}" if options else "lemix", lambda: 0.0, room)


def node_of(decision: object) -> int:
    assert isinstance(decision, Place)
    return decision.node


def expect_requests(state: ClusterState) -> None:
    """Ten requests and a batch a second have come, and were done at once; all nodes are idle at 2.0."""
    for i in range(20):
        submit(state, lemix(), request(f"past{i}", 100), i / 10)
        state.apply(TasksEnded((f"past{i}",), i / 10))
    for i in range(3):
        submit(state, lemix("without=deferral"), batch(f"past-b{i}", 10), float(i))
        state.apply(TasksEnded((f"past-b{i}",), float(i)))


# Constants that follow the load


def test_comfort_and_opening_shrink_from_calm_to_busy_unless_they_are_set() -> None:
    options = LemixOptions()
    loads = [0.0, CALM_LOAD, (CALM_LOAD + BUSY_LOAD) / 2, BUSY_LOAD, 1.0]
    assert [options.comfort_at(load) for load in loads] == pytest.approx([0.6, 0.6, 0.45, 0.3, 0.3])
    assert [options.opening_at(load) for load in loads] == pytest.approx([0.95, 0.95, 0.725, 0.5, 0.5])
    fixed = LemixOptions(comfort=0.1, opening=0.2)
    assert {fixed.comfort_at(load) for load in loads} == {0.1}
    assert {fixed.opening_at(load) for load in loads} == {0.2}


def test_the_load_is_the_time_for_which_the_devices_of_ready_nodes_work() -> None:
    state = cluster(0, 1, unready=(2,))
    assert state.load(0.0) == 0.0
    for second in range(1, 101):
        for stage in range(2):
            op = StageOp(
                kind="step",
                task_ids=("b",),
                index=0,
                num_tokens=0,
                num_pairs=0,
                num_sequences=0,
                num_context_tokens=0,
            )
            ended = OpEnded(op=op, elapsed_s=0.6, ago_s=0.0)
            progress = StageProgress(node=0, stage=stage, ended=(ended,), running=None)
            state.apply(StageProgressed(progress, float(second)))
    assert state.load(100.0) == pytest.approx(0.3, rel=0.06)


# Consolidation


def test_requests_share_a_node_while_they_are_answered_in_time() -> None:
    state = cluster(0, 1, 2)
    assert [node_of(submit(state, lemix(), request(f"r{i}", 100), 0.0)) for i in range(3)] == [0, 0, 0]
    alone = lemix("without=consolidation+idleness")
    assert node_of(ask(state, alone, request("r", 100), 0.0)) == 1


def test_a_node_is_opened_when_the_others_would_answer_late() -> None:
    state = cluster(0, 1)
    first = batch("b", 200)
    assign(state, first, Place(0), 0.0)
    start_forward(state, first, 0.0, node=0, stage=1)
    # Stage 1 has the batch until 0.6: a request of 200 tokens would be answered at 0.8.
    # Alone it takes 0.4, so that it has 0.6 to spare.
    assert node_of(ask(state, lemix("comfort=0.5,opening=0.6"), request("r", 200), 0.0)) == 1
    assert node_of(ask(state, lemix("comfort=0.5,opening=0.7"), request("r", 200), 0.0)) == 0


def test_on_nodes_of_one_stage_the_way_of_the_answer_is_of_the_objective() -> None:
    """There an op may be as short as a hop."""

    def node_at(hop_s: float) -> int:
        costs = LinearCosts(1, hop_s=hop_s)
        state, first = cluster(0, 1, num_stages=1, costs=costs), batch("b", 250)
        assign(state, first, Place(0), 0.0)
        start_forward(state, first, hop_s, node=0)  # told a hop late: the stage has it until 0.75
        return node_of(ask(state, lemix(), request("r", 200), hop_s))

    assert node_at(0.0) == 0  # the answer at 0.95 is within 0.95 of the 0.8 s to spare
    assert node_at(0.03) == 1  # at 0.95 again, and at the gateway at 1.01


def test_of_two_nodes_that_answer_alike_the_one_without_training_is_taken() -> None:
    state = cluster(0, 1)
    for node in (0, 1):
        assign(state, request(f"r{node}", 100), Place(node), 0.0)
    assign(state, batch("b", 100), Place(0), 0.0)
    assert node_of(ask(state, lemix(), request("r", 100), 0.0)) == 1
    assert node_of(ask(state, lemix("exposure=0"), request("r", 100), 0.0)) == 0


def test_four_batches_and_four_requests_need_one_node_not_two() -> None:
    """The paper's figure of consolidation."""

    def nodes_used(policy: Policy) -> set[int]:
        state, used = cluster(0, 1), set()
        for i in range(4):
            heavy, light = batch(f"b{i}", 150), request(f"r{i}", 100)
            used.add(node := node_of(submit(state, policy, heavy, float(i))))
            start_forward(state, heavy, float(i), node=node)
            place = submit(state, policy, light, i + 0.05)
            assert place.forecast is None or place.forecast.end_s <= i + 0.05 + SLO_S
            used.add(node_of(place))
            state.apply(TasksEnded((heavy.task_id, light.task_id), i + 0.1))
        return used

    assert nodes_used(policy_named("round_robin", lambda: 0.0)) == {0, 1}
    assert nodes_used(lemix()) == {0}
    assert nodes_used(lemix("without=consolidation+idleness")) == {0, 1}


def test_batches_spread_where_they_would_queue() -> None:
    state = cluster(0, 1)
    assert [node_of(submit(state, lemix(), batch(f"b{i}", 100), 0.0)) for i in range(2)] == [0, 1]


def test_after_a_pause_the_node_that_worked_last_goes_on() -> None:
    state = cluster(0, 1, 2)
    assign(state, request("r", 100), Place(1), 3.0)
    state.apply(TasksEnded(("r",), 3.0))
    assert node_of(ask(state, lemix(), request("next", 100), 9.0)) == 1


def test_a_node_without_work_stays_active_for_a_while() -> None:
    state = cluster(0, 1)
    assign(state, request("old", 100), Place(1), 0.0)
    state.apply(TasksEnded(("old",), 0.0))
    assign(state, request("long", 300), Place(0), 2.0)
    # Node 0 would answer after 0.7 s, more than is comfortable; node 1 after 0.2 s, but it is idle for 2 s.
    assert node_of(ask(state, lemix("linger=2.5"), request("r", 100), 2.0)) == 1
    assert node_of(ask(state, lemix("linger=1.5"), request("r", 100), 2.0)) == 0


# Idleness and consistency


def test_a_working_node_is_preferred_to_one_that_stands_still() -> None:
    state = cluster(0, 1)
    assign(state, request("old", 100), Place(0), 0.0)
    state.apply(TasksEnded(("old",), 0.0))
    assign(state, request("new", 100), Place(1), 0.9)
    assert node_of(ask(state, lemix("idleness=0.5"), request("r", 100), 0.9)) == 1
    assert node_of(ask(state, lemix("idleness=0.5,without=idleness"), request("r", 100), 0.9)) == 0


def test_of_equal_nodes_the_one_with_tasks_of_like_length_is_taken() -> None:
    state = cluster(0, 1)
    for node, lengths in ((0, (10, 20)), (1, (190, 210))):
        for length in lengths:
            assign(state, request(f"{node}-{length}", length), Place(node), 0.0)
            state.apply(TasksEnded((f"{node}-{length}",), 0.0))
        assign(state, request(f"{node}", 100), Place(node), 1.0)
    assert node_of(ask(state, lemix(), request("r", 180), 1.0)) == 1
    assert node_of(ask(state, lemix("without=consistency"), request("r", 180), 1.0)) == 0


# Deferral


def test_a_batch_waits_when_it_would_make_requests_late_everywhere() -> None:
    state = cluster(0)
    expect_requests(state)
    heavy = batch("b", 1000)  # 3 s on the last stage, without interruption
    assert isinstance(ask(state, lemix(), heavy, 2.0), Wait)
    assert node_of(ask(state, lemix("without=deferral"), heavy, 2.0)) == 0


def test_batches_yield_while_requests_cannot_be_in_time_and_come_back_by_themselves() -> None:
    state = cluster(0, 1)
    expect_requests(state)
    assert isinstance(ask(state, lemix(), batch("b", 10), 2.0), Place)
    state.apply(RequestsLate(2.0))
    waits = ask(state, lemix(), batch("b", 10), 2.0)
    assert isinstance(waits, Wait) and waits.reason == "requests would be late"
    assert isinstance(ask(state, lemix("without=deferral"), batch("b", 10), 2.0), Place)
    assert isinstance(ask(state, lemix(), batch("b", 10), 2.0 + YIELDING * SLO_S), Place)
    patient = batch("patient", 10)
    state.apply(RequestsLate(12.0))
    assert isinstance(ask(state, lemix(), patient, 12.0, arrived_s=2.0 + 0.2), Wait)
    assert isinstance(ask(state, lemix(), patient, 12.0, arrived_s=2.0), Place)


def test_a_batch_that_harms_nobody_does_not_wait() -> None:
    state = cluster(0)
    assert node_of(ask(state, lemix(), batch("b", 1000), 2.0)) == 0  # no request is expected
    expect_requests(state)
    assert node_of(ask(state, lemix(), batch("b", 200), 2.0)) == 0  # 0.6 s: the objective leaves 0.8 s


def test_a_batch_need_not_wait_while_another_node_answers_in_time() -> None:
    state = cluster(0, 1)
    expect_requests(state)
    assert isinstance(ask(state, lemix(), batch("b", 1000), 2.0), Place)


def test_a_batch_does_not_wait_for_ever() -> None:
    state = cluster(0)
    expect_requests(state)
    heavy = batch("b", 1000)
    waits = [
        isinstance(ask(state, lemix(), heavy, 2.0, arrived_s=2.0 - waited_s), Wait) for waited_s in range(12)
    ]
    assert waits == sorted(waits, reverse=True) and waits[0] and not waits[-1]


def test_a_batch_does_not_wait_for_requests_that_hardly_come() -> None:
    state = cluster(0)
    expect_requests(state)
    assert isinstance(ask(state, lemix(), batch("b", 1000), 6.0), Wait)
    for i in range(9):
        submit(state, lemix("without=deferral"), batch(f"late-b{i}", 10), 59.0 + i / 10)
        state.apply(TasksEnded((f"late-b{i}",), 59.0 + i / 10))
    assert node_of(ask(state, lemix(), batch("b", 1000), 60.0)) == 0  # ten a second have become 0.006


def test_a_batch_may_make_some_requests_late_and_more_the_longer_it_has_waited() -> None:
    state = cluster(0)
    expect_requests(state)
    # A request takes 0.2 s: of 0.81 s on the last stage 0.01 s are unsafe; 1.5 batches come in a second.
    slightly = batch("b", 270)
    assert isinstance(ask(state, lemix("late_share=0.005"), slightly, 2.0), Wait)
    assert isinstance(ask(state, lemix("late_share=0.02"), slightly, 2.0), Place)
    waited = lemix("late_share=0.005,patience=100")
    assert isinstance(ask(state, waited, slightly, 2.0, arrived_s=1.5), Wait)
    assert isinstance(ask(state, waited, slightly, 2.0, arrived_s=0.0), Place)


def test_a_batch_that_waits_asks_again_when_its_patience_would_do() -> None:
    state = cluster(0)
    expect_requests(state)
    running = batch("a", 500)
    assign(state, running, Place(0), 2.0)
    start_forward(state, running, 2.0, node=0, stage=1)  # safe again at 2.6
    slightly = batch("b", 270)
    decision = ask(state, lemix("late_share=0,patience=20"), slightly, 2.0)
    assert isinstance(decision, Wait) and 2.1 < decision.until_s < 2.6
    soon = ask(state, lemix("late_share=0,patience=0.1"), slightly, 2.0)
    assert isinstance(soon, Wait) and soon.until_s == pytest.approx(2.1)  # a tenth of an objective at least


def test_a_batch_waits_until_what_blocks_requests_is_over() -> None:
    state = cluster(0)
    expect_requests(state)
    running = batch("a", 500)
    assign(state, running, Place(0), 2.0)
    start_forward(state, running, 2.0, node=0, stage=1)
    # Stage 1 is held for 1.5 s, a request of the mean length takes 0.1 s there: 1.6 s, 0.6 s too long.
    decision = ask(state, lemix(), batch("b", 1000), 2.0)
    assert isinstance(decision, Wait) and decision.until_s == pytest.approx(2.0 + 0.6)


# Memory


def test_a_request_waits_for_room_in_the_cache_and_then_is_refused() -> None:
    state = cluster(0, kv_blocks=10)  # 160 tokens
    submit(state, lemix(), request("first", 50, max_tokens=51), 0.0)
    second = request("second", 50, max_tokens=50)
    assert isinstance(ask(state, lemix(), second, 1.0), Wait)
    assert node_of(ask(state, lemix("without=memory"), second, 1.0)) == 0
    refused = ask(state, lemix(), second, 11.0, arrived_s=1.0)
    assert isinstance(refused, Refuse) and refused.code == 429 and "99 tokens of KV cache" in refused.reason


def test_a_request_that_no_cache_could_hold_is_refused_at_once() -> None:
    state = cluster(0, 1, kv_blocks=10)  # 160 tokens
    submit(state, lemix(), request("first", 50, max_tokens=51), 0.0)
    refused = ask(state, lemix(), request("r", 100, max_tokens=62), 0.0)
    assert isinstance(refused, Refuse) and refused.code == 400
    assert refused.reason == "prompt and max_tokens want 161 tokens of KV cache; a node has 160"
    assert isinstance(ask(state, lemix(), request("r", 100, max_tokens=61), 0.0), Place)


def test_a_request_goes_where_there_is_room() -> None:
    state = cluster(0, 1, kv_blocks=10)
    submit(state, lemix(), request("first", 50, max_tokens=51), 0.0)
    assert node_of(ask(state, lemix(), request("second", 50, max_tokens=50), 0.0)) == 1


def test_a_batch_waits_for_room_for_its_activations_and_then_offloads_them() -> None:
    state, policy = cluster(0), lemix(room=TrainingRoom(tokens=100))
    assert submit(state, policy, batch("first", 80), 0.0).offload is False
    second = batch("second", 80)
    assert isinstance(ask(state, policy, second, 1.0), Wait)
    late = ask(state, policy, second, 1.0 + 0.02 * SLO_S, arrived_s=1.0)
    assert isinstance(late, Place) and late.offload
    unminded = ask(state, lemix("without=memory", TrainingRoom(tokens=100)), second, 1.0)
    assert isinstance(unminded, Place) and not unminded.offload


def test_a_batch_that_can_never_fit_is_offloaded_at_once() -> None:
    decision = ask(cluster(0), lemix(room=TrainingRoom(tokens=100)), batch("b", 60, 60), 0.0)
    assert isinstance(decision, Place) and decision.offload
    # Two stages have two microbatches in flight, whatever the batch has.
    decision = ask(cluster(0), lemix(room=TrainingRoom(tokens=100)), batch("b", 50, 50, 50), 0.0)
    assert isinstance(decision, Place) and not decision.offload


# The whole


def test_the_papers_score_prefers_the_slower_node() -> None:
    state = cluster(0, 1)
    assign(state, request("r0", 200), Place(1), 0.0)
    assert node_of(ask(state, lemix("score=paper"), request("r", 100), 0.0)) == 1
    assert node_of(ask(state, lemix("without=consolidation+idleness"), request("r", 100), 0.0)) == 0


def test_the_profile_is_left_to_whoever_makes_the_costs() -> None:
    assert uses_profile(lemix())
    assert not uses_profile(lemix("without=profile"))


@pytest.mark.parametrize("task", [request("r", 100), batch("b", 300, 200)])
def test_deciding_changes_nothing(task: object) -> None:
    state, policy = cluster(0, 1), lemix()
    expect_requests(state)
    submit(state, policy, batch("before", 100), 2.0)
    before = copy.deepcopy(state)
    decisions = [ask(state, policy, task, 2.0) for _ in range(3)]
    assert decisions == [ask(before, policy, task, 2.0)] * 3
    assert state.status() == before.status()
    assert [list(state.node(node).node_model.assigned()) == [] for node in (0, 1)] == [
        list(before.node(node).node_model.assigned()) == [] for node in (0, 1)
    ]
