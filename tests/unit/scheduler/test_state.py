"""Nodes come, go silent, restart and leave; tasks are placed, end, and are lost with their node."""

from dataclasses import replace

import pytest
from msgspec import structs

from services.scheduler.events import (
    HeartbeatSeen,
    ListenedUntil,
    LostTask,
    PlacedTask,
    ProfileRead,
    StageLeft,
    StageProgressed,
    TaskArrived,
    TaskAssigned,
    TasksEnded,
    TimePassed,
)
from services.scheduler.forecast import Forecast, Interval
from services.scheduler.objectives import Objectives
from services.scheduler.state import LOST_AFTER_S, MAX_REMEMBERED, ClusterState
from services.scheduler.tasks import TaskShape
from shared.messages.cluster import StageStopped, TaskKind
from shared.messages.events import OpEnded, StageOp, StageProgress
from shared.profiles.times import work_of_rows
from tests.support.cluster import heartbeat
from tests.support.policies import LinearCosts


def with_nodes(*nodes: int) -> ClusterState:
    state = ClusterState(costs=LinearCosts(None))
    for node in nodes:
        state.apply(HeartbeatSeen(heartbeat(node), 0.0))
    return state


def task(
    task_id: str, node: int = 0, kind: TaskKind = "inference", overdue_s: float | None = None
) -> PlacedTask:
    return PlacedTask(task_id=task_id, kind=kind, node=node, gateway="g", overdue_s=overdue_s)


def test_a_node_is_ready_when_all_its_stages_are() -> None:
    state = ClusterState(costs=LinearCosts(None))
    state.apply(HeartbeatSeen(heartbeat(3, 1, num_stages=2), 0.0))
    assert state.ready_nodes == []
    state.apply(HeartbeatSeen(heartbeat(3, 0, num_stages=2, ready=False), 0.0))
    assert state.ready_nodes == []
    state.apply(HeartbeatSeen(heartbeat(3, 0, num_stages=2), 0.1))
    assert state.ready_nodes == [3]
    state.apply(HeartbeatSeen(heartbeat(3, 1, num_stages=2, ready=False), 0.2))
    assert state.ready_nodes == []


def test_a_node_whose_stages_hold_different_weights_is_not_ready() -> None:
    state = ClusterState(costs=LinearCosts(None))
    for whole, ready_nodes in ((False, []), (True, [3]), (False, [])):
        state.apply(HeartbeatSeen(heartbeat(3, 0, num_stages=2, whole=whole), 0.0))
        state.apply(HeartbeatSeen(heartbeat(3, 1, num_stages=2, whole=False), 0.0))
        assert state.ready_nodes == ready_nodes


def test_stages_that_disagree_on_their_number_make_no_node() -> None:
    state = ClusterState(costs=LinearCosts(None))
    state.apply(HeartbeatSeen(heartbeat(0, 0, num_stages=2), 0.0))
    state.apply(HeartbeatSeen(heartbeat(0, 1, num_stages=3), 0.0))
    assert state.ready_nodes == []


def test_ready_nodes_are_ascending() -> None:
    assert with_nodes(5, 1, 3).ready_nodes == [1, 3, 5]


def test_a_silent_stage_takes_its_node_and_tasks_with_it() -> None:
    state = with_nodes(0, 1)
    state.apply(HeartbeatSeen(heartbeat(1), 1.0))
    state.apply(TaskAssigned(task("t0", 0), 0.0))
    state.apply(TaskAssigned(task("t1", 1), 0.0))
    assert state.apply(ListenedUntil(LOST_AFTER_S - 0.01)) == []
    assert state.apply(ListenedUntil(LOST_AFTER_S)) == [
        LostTask(task("t0", 0), "stage 0 of node 0 was silent for 3 s")
    ]
    assert state.ready_nodes == [1]
    assert state.placed("t0") is None
    assert state.placed("t1") == task("t1", 1)
    assert [node.node for node in state.status()] == [1]


def test_one_silent_stage_of_two_leaves_the_other_in_the_status() -> None:
    state = ClusterState(costs=LinearCosts(None))
    state.apply(HeartbeatSeen(heartbeat(0, 0, num_stages=2), 0.0))
    state.apply(HeartbeatSeen(heartbeat(0, 1, num_stages=2), 2.0))
    state.apply(ListenedUntil(LOST_AFTER_S))
    (node,) = state.status()
    assert (node.ready, [beat.stage for beat in node.stages]) == (False, [1])


def test_heartbeats_tell_which_stages_share_a_device() -> None:
    state = ClusterState(costs=LinearCosts(None))
    for stage in range(3):
        state.apply(HeartbeatSeen(heartbeat(0, stage, num_stages=3), 0.0))
    assert state.node(0).node_model.devices == ()
    shared = structs.replace(heartbeat(0, 2, num_stages=3), first_on_device=1)
    state.apply(HeartbeatSeen(shared, 1.0))
    assert state.node(0).node_model.devices == (0, 1, 1)
    state.apply(HeartbeatSeen(heartbeat(0, 2, num_stages=3), 2.0))
    assert state.node(0).node_model.devices == ()


def test_a_restarted_stage_costs_the_tasks_of_its_node() -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(task("t"), 0.0))
    assert state.apply(HeartbeatSeen(heartbeat(0, instance="b"), 1.0)) == [
        LostTask(task("t"), "stage 0 of node 0 restarted")
    ]
    assert state.ready_nodes == [0]
    assert state.apply(HeartbeatSeen(heartbeat(0, instance="b"), 2.0)) == []


def test_a_stage_that_leaves_costs_the_tasks_of_its_node() -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(task("t"), 0.0))
    lost = state.apply(StageLeft(StageStopped(node=0, stage=0, instance="a")))
    assert lost == [LostTask(task("t"), "stage 0 of node 0 was stopped")]
    assert state.num_nodes == 0
    assert state.apply(ListenedUntil(100.0)) == []


@pytest.mark.parametrize(("node", "instance"), [(0, "earlier"), (9, "a")])
def test_the_end_of_a_stage_that_is_not_there_changes_nothing(node: int, instance: str) -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(task("t"), 0.0))
    assert state.apply(StageLeft(StageStopped(node=node, stage=0, instance=instance))) == []
    assert state.ready_nodes == [0]
    assert state.placed("t") is not None


def test_training_tasks_leave_with_their_node_but_are_not_reported() -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(task("b", kind="training"), 0.0))
    assert state.apply(ListenedUntil(LOST_AFTER_S)) == []
    assert state.placed("b") is None


def test_ended_tasks_leave_and_unknown_ones_are_ignored() -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(task("t"), 0.0))
    state.apply(TaskAssigned(task("b", kind="training"), 0.0))
    (before,) = state.status()
    assert (before.inference_tasks, before.training_tasks) == (1, 1)
    state.apply(TasksEnded(("t", "never heard of"), 0.0))
    assert state.node(0).num_tasks == 1
    assert state.placed("t") is None


def test_an_overdue_task_leaves_unasked() -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(task("t", overdue_s=2.0), 0.0))
    state.apply(TimePassed(1.9))
    assert state.node(0).num_tasks == 1
    assert state.apply(TimePassed(2.0)) == []
    assert state.node(0).num_tasks == 0


def test_the_deadline_of_an_ended_task_does_not_end_its_successor() -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(task("t", overdue_s=1.0), 0.0))
    state.apply(TasksEnded(("t",), 0.0))
    state.apply(TaskAssigned(task("t", overdue_s=2.0), 0.0))
    state.apply(TimePassed(1.5))
    assert state.node(0).num_tasks == 1


# What is learnt of tasks and stages


def placed(task_id: str, tokens: int, *, max_tokens: int = 1, forecast: Forecast | None = None) -> PlacedTask:
    shape = TaskShape(prompt_tokens=tokens, max_tokens=max_tokens)
    return PlacedTask(task_id=task_id, kind="inference", node=0, shape=shape, forecast=forecast)


def iterated(*task_ids: str, tokens: int, elapsed_s: float, stage: int = 0) -> StageProgress:
    op = StageOp(
        kind="iteration",
        task_ids=task_ids,
        index=0,
        num_tokens=tokens,
        num_pairs=tokens,
        num_sequences=1,
        num_context_tokens=tokens,
    )
    return StageProgress(
        node=0, stage=stage, ended=(OpEnded(op=op, elapsed_s=elapsed_s, ago_s=0.0),), running=None
    )


def test_a_task_arrives_once_however_often_it_asks() -> None:
    state, shape = with_nodes(0), TaskShape(prompt_tokens=30, max_tokens=1)
    for now_s in (1.0, 2.0, 3.0):
        state.apply(TaskArrived("r", "inference", shape, now_s))
    batch_shape = TaskShape(microbatches=(work_of_rows(0, 8), work_of_rows(0, 4)))
    state.apply(TaskArrived("b", "training", batch_shape, 3.0))
    assert state.arrived_s("r") == 1.0
    assert (state.demand.inference_lengths.count, state.demand.inference_lengths.mean) == (1, 30)
    assert state.demand.inference_rate.per_s(4.0) > 0 and state.demand.training_rate.per_s(4.0) > 0
    state.apply(TaskAssigned(placed("r", 30), 4.0))
    assert state.arrived_s("r") is None


def test_only_so_many_askers_are_remembered() -> None:
    state = with_nodes(0)
    for index in range(MAX_REMEMBERED + 1):
        state.apply(TaskArrived(f"r{index}", "inference", TaskShape(prompt_tokens=1), 1.0 + index))
    assert state.arrived_s("r0") is None
    assert state.arrived_s("r1") == 2.0


def test_the_cache_has_room_for_what_placed_tasks_may_grow_to() -> None:
    state = ClusterState(costs=LinearCosts(None))
    beat = structs.replace(heartbeat(0), kv_blocks_total=10, kv_block_size=16)
    state.apply(HeartbeatSeen(beat, 0.0))
    state.apply(TaskAssigned(placed("r", 20, max_tokens=13), 0.0))  # 32 rows: the last token has none
    state.apply(TaskAssigned(placed("s", 1), 0.0))  # one row takes a whole block
    assert state.node(0).kv_tokens_free == 160 - 32 - 16
    state.apply(TasksEnded(("r",), 0.0))
    assert state.node(0).kv_tokens_free == 160 - 16


def test_the_cache_is_empty_after_stage_0_is_lost() -> None:
    state = ClusterState(costs=LinearCosts(None))
    room = {"kv_blocks_total": 10, "kv_block_size": 16, "num_stages": 2}
    for stage in (0, 1):
        state.apply(HeartbeatSeen(structs.replace(heartbeat(0, stage), **room), 0.0))
    state.apply(TaskAssigned(placed("r", 20), 0.0))
    state.apply(StageLeft(StageStopped(node=0, stage=0, instance=heartbeat(0).instance)))
    state.apply(HeartbeatSeen(structs.replace(heartbeat(0, instance="b"), **room), 1.0))
    assert state.node(0).kv_tokens_free == 160


def test_a_placed_task_that_asks_again_is_no_new_arrival() -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(placed("r", 1), 0.0))
    state.apply(TaskArrived("r", "inference", TaskShape(prompt_tokens=1), 1.0))
    assert state.arrived_s("r") is None


def test_the_objective_follows_the_mean_prompt_where_no_profile_says() -> None:
    state = ClusterState(costs=LinearCosts(2), objectives=Objectives(slo_factor=4.0))
    for task_id, tokens in (("r", 10), ("s", 30)):
        state.apply(TaskArrived(task_id, "inference", TaskShape(prompt_tokens=tokens), 0.0))
    assert state.slo_s == pytest.approx(4.0 * 2 * 0.020)
    assert ClusterState(costs=LinearCosts(2), objectives=Objectives(ttft_s=1.5)).slo_s == 1.5


def test_errors_of_costs_and_of_forecasts_are_measured() -> None:
    state = with_nodes(0)
    forecast = Forecast((Interval(0.0, 0.5),))
    state.apply(TaskAssigned(placed("r", 100, forecast=forecast), 0.0))  # 0.1 s, as its node predicts
    state.apply(TaskAssigned(placed("s", 100), 0.0))
    state.apply(StageProgressed(iterated("r", tokens=100, elapsed_s=0.2), 0.2))
    assert state.accuracy.forward_error.count == 1
    assert state.accuracy.forward_error.mean == pytest.approx(0.5)
    assert state.accuracy.response_error.count == 1
    assert state.accuracy.response_error.mean == pytest.approx(0.5)


def test_first_tokens_count_as_in_time_or_late() -> None:
    state = with_nodes(0)
    for task_id, ttft_s in (("r", 0.2), ("s", 0.3), ("t", None)):
        state.apply(TaskAssigned(replace(placed(task_id, 10), ttft_s=ttft_s), 0.0))
    for task_id in ("r", "s", "t"):
        state.apply(StageProgressed(iterated(task_id, tokens=10, elapsed_s=0.01), 0.25))
    assert (state.accuracy.num_in_time, state.accuracy.num_late) == (1, 1)


def test_progress_of_unknown_nodes_and_stages_changes_nothing() -> None:
    state = with_nodes(0)
    state.apply(StageProgressed(iterated("r", tokens=1, elapsed_s=0.1, stage=5), 0.2))
    state.apply(StageProgressed(structs.replace(iterated("r", tokens=1, elapsed_s=0.1), node=9), 0.2))
    assert state.accuracy.forward_error.count == 0
    assert state.node(0).node_model.prediction.is_idle


def test_a_lost_node_leaves_a_clean_timeline() -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(placed("r", 100), 0.0))
    state.apply(HeartbeatSeen(heartbeat(0, instance="b"), 1.0))
    assert list(state.node(0).node_model.assigned()) == []
    assert state.node(0).node_model.prediction.is_idle
    assert state.node(0).kv_tokens_free == 8


def test_a_node_with_another_number_of_stages_than_the_costs_is_never_ready() -> None:
    state = ClusterState(costs=LinearCosts(2))
    state.apply(HeartbeatSeen(heartbeat(0), 0.0))
    assert state.ready_nodes == []


def test_a_node_starts_from_the_profile_that_it_tells() -> None:
    state = with_nodes(0)
    state.apply(ProfileRead("fast", LinearCosts(2, forward_s_per_token=0.0001)))
    for node, profile in ((1, "fast"), (2, "unheard of")):
        state.apply(HeartbeatSeen(structs.replace(heartbeat(node), profile=profile), 0.0))
    work = work_of_rows(0, 100)
    assert [state.node(node).costs.iteration_s(0, work) for node in (0, 1, 2)] == pytest.approx(
        [0.1, 0.01, 0.1]
    )
    assert state.node(0).costs.alike == state.node(2).costs.alike != state.node(1).costs.alike
