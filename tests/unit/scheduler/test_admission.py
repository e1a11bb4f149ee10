"""Who is served in time, who is refused and who waits, on hand-drawn pipelines.

Two stages; a token takes a stage 1 ms forward, messages take no time; the objective is 1 s.
"""

import pytest
from msgspec import structs

from services.scheduler.events import TaskArrived, TaskLeftLine, TaskQueued
from services.scheduler.objectives import MeanPrompt, Objectives, WhenLate
from services.scheduler.policies import policy_named
from services.scheduler.policies.admission import MAX_IN_LINE
from services.scheduler.policies.base import Place, Refuse, Wait
from services.scheduler.state import ClusterState
from services.scheduler.tasks import shape_of
from shared.messages.inference import InferenceTask, Objective
from tests.support.policies import OBJECTIVES, SLO_S, LinearCosts, ask, assign, cluster, request, submit

LEMIX = policy_named("lemix", lambda: 0.0)


def asked(task_id: str, prompt_tokens: int, objective: Objective) -> InferenceTask:
    return structs.replace(request(task_id, prompt_tokens, max_tokens=9), objective=objective)


def busy_until(
    *ends_s: float, objectives: Objectives = OBJECTIVES, mean_prompt: MeanPrompt | None = None
) -> ClusterState:
    """A cluster whose nodes have prompts of so many seconds before them, on each stage."""
    state = cluster(*range(len(ends_s)), objectives=objectives, mean_prompt=mean_prompt)
    for node, end_s in enumerate(ends_s):
        for i in range(round(end_s * 1000 / 250)):
            task = request(f"n{node}-{i}", 250)
            state.apply(TaskArrived(task.task_id, "inference", shape_of(task), 0.0))
            assign(state, task, Place(node), 0.0)
    return state


def test_a_request_goes_where_it_is_in_time() -> None:
    decision = ask(busy_until(1.5, 0.25), LEMIX, request("r", 100), 0.0)
    assert isinstance(decision, Place)
    assert decision.node == 1
    assert decision.due_s == pytest.approx(SLO_S)


def test_one_that_cannot_be_in_time_is_refused_with_the_time_when_it_could() -> None:
    task = asked("r", 100, Objective(when_late="refuse"))
    decision = ask(busy_until(2.0, 3.0), LEMIX, task, 0.0)
    assert isinstance(decision, Refuse)
    assert decision.code == 429
    assert decision.retry_after_s is not None
    assert 1.0 <= decision.retry_after_s <= 1.7  # it would have its first token after 2.0 to 2.7 s


@pytest.mark.parametrize(
    ("run", "own", "refuses"),
    [
        (Objectives(slo_factor=0.5), Objective(), False),
        (Objectives(slo_factor=0.5, when_late="refuse"), Objective(), True),
        (Objectives(slo_factor=0.5, when_late="refuse"), Objective(when_late="serve_last"), False),
        (Objectives(ttft_s=0.01), Objective(), True),
        (Objectives(ttft_s=0.01), Objective(ttft_s=10.0), False),
        (Objectives(ttft_s=0.01, when_late="serve_last"), Objective(), False),
        (Objectives(), Objective(ttft_s=0.01), True),
        (Objectives(), Objective(ttft_s=0.01, when_late="serve_last"), False),
    ],
)
def test_only_a_time_that_somebody_has_set_makes_a_request_be_refused(
    run: Objectives, own: Objective, refuses: bool
) -> None:
    state = cluster(0, objectives=run)
    assert isinstance(ask(state, LEMIX, asked("r", 100, own), 0.0), Refuse) == refuses


def test_a_late_request_waits_behind_those_in_time_and_runs_when_nobody_else_waits() -> None:
    state = busy_until(2.0)
    late = asked("late", 100, Objective(when_late="serve_last"))
    decision = ask(state, LEMIX, late, 0.0)
    assert isinstance(decision, Wait) and decision.in_line
    assert 1.0 < decision.until_s <= 2.0
    assert isinstance(ask(cluster(0), LEMIX, late, 5.0, arrived_s=0.0), Place)


@pytest.mark.parametrize(
    ("busy_s", "when_late", "waits"),
    [(0.75, "serve_last", True), (0.75, None, False), (2.0, "serve_last", True), (2.0, None, True)],
)
def test_where_nobody_has_set_a_time_late_requests_fill_the_next_iteration(
    busy_s: float, when_late: WhenLate | None, waits: bool
) -> None:
    """An iteration takes 512 rows; with 750 before it a stage is never idle, and never half full."""
    state = busy_until(busy_s, objectives=Objectives(slo_factor=1.0), mean_prompt=MeanPrompt(100, 0.2))
    decision = ask(state, LEMIX, asked("r", 100, Objective(when_late=when_late)), 0.0)
    assert isinstance(decision, Wait if waits else Place)


def test_late_requests_go_in_the_order_of_their_priority_and_arrival() -> None:
    state = cluster(0)
    for task_id, priority, arrived_s in (("a", 0, 1.0), ("b", 0, 0.5), ("c", -1, 2.0)):
        state.apply(TaskQueued(task_id, priority, arrived_s))
    order = []
    while (first := state.waiting_line.first) is not None:
        for other in {"a", "b", "c"} - {first} - set(order):
            waits = ask(state, LEMIX, request(other, 100), 9.0, arrived_s=0.0)
            assert isinstance(waits, Wait) and waits.in_line
        assert isinstance(ask(state, LEMIX, request(first, 100), 9.0, arrived_s=0.0), Place)
        state.apply(TaskLeftLine(first))
        order.append(first)
    assert order == ["c", "b", "a"]


def test_a_full_line_refuses_who_comes_but_keeps_who_is_in_it() -> None:
    state = cluster(0)
    for number in range(MAX_IN_LINE):
        state.apply(TaskQueued(f"t{number}", 0, 0.0))
    assert isinstance(ask(state, LEMIX, request("r", 100), 9.0, arrived_s=0.0), Refuse)
    assert isinstance(ask(state, LEMIX, request("t7", 100), 9.0, arrived_s=0.0), Wait)


def test_requests_leave_room_for_more_urgent_ones_while_such_come() -> None:
    state = busy_until(0.5)
    usual = asked("r", 100, Objective())  # its first token would come after 0.7 to 0.85 s
    urgent = asked("u", 100, Objective(priority=-1))
    assert isinstance(ask(state, LEMIX, usual, 0.0), Place)
    state.apply(TaskArrived("before", "inference", shape_of(urgent), 0.0, priority=-1))
    assert isinstance(ask(state, LEMIX, usual, 0.0), Wait)
    assert isinstance(ask(state, LEMIX, urgent, 0.0), Place)


def test_a_node_on_which_tokens_would_come_too_slowly_gets_no_more_requests() -> None:
    state = cluster(0)
    for i in range(8):
        submit(state, LEMIX, request(f"r{i}", 10, max_tokens=50), 0.0)
    assert isinstance(ask(state, LEMIX, asked("r", 10, Objective(tbt_s=0.02)), 0.0), Place)
    decision = ask(state, LEMIX, asked("r", 10, Objective(tbt_s=0.005, when_late="refuse")), 0.0)
    assert isinstance(decision, Refuse)


def test_longer_prompts_have_more_time() -> None:
    state = cluster(0, objectives=Objectives(slo_factor=5.0), mean_prompt=MeanPrompt(100, 0.2))
    assert state.ttft_slo_s(10) == state.ttft_slo_s(100) == state.slo_s == pytest.approx(1.0)
    assert state.ttft_slo_s(1000) == pytest.approx(10.0)
    set_by_hand = Objectives(ttft_s=0.5, ttft_per_token_s=0.001)
    assert cluster(0, objectives=set_by_hand).ttft_slo_s(1000) == pytest.approx(1.5)
    assert LinearCosts(2).hop_s == 0


def test_a_long_prompt_waits_no_longer_for_others_than_a_mean_one_could() -> None:
    """By its length it is due after 5 s; but if long ones queued that long, no other could be in time."""
    mean = MeanPrompt(100, 0.2)
    long = request("long", 500, max_tokens=9)
    for busy_s, decision in ((0.5, Place), (1.5, Wait)):
        state = busy_until(busy_s, objectives=Objectives(slo_factor=5.0), mean_prompt=mean)
        assert isinstance(ask(state, LEMIX, long, 0.0), decision)
    patient = structs.replace(long, objective=Objective(ttft_s=5.0))
    assert isinstance(ask(state, LEMIX, patient, 0.0), Place)
