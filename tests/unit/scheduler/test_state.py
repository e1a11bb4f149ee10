"""Nodes come, go silent, restart and leave; tasks are placed, end, and are lost with their node."""

import pytest

from services.scheduler.state import (
    LOST_AFTER_S,
    ClusterState,
    HeartbeatSeen,
    LostTask,
    PlacedTask,
    StageLeft,
    TaskAssigned,
    TasksEnded,
    TimePassed,
)
from shared.messages.cluster import StageStopped, TaskKind
from tests.support.cluster import heartbeat


def with_nodes(*nodes: int) -> ClusterState:
    state = ClusterState()
    for node in nodes:
        state.apply(HeartbeatSeen(heartbeat(node), 0.0))
    return state


def task(
    task_id: str, node: int = 0, kind: TaskKind = "inference", overdue_s: float | None = None
) -> PlacedTask:
    return PlacedTask(task_id=task_id, kind=kind, node=node, gateway="g", overdue_s=overdue_s)


def test_a_node_is_ready_when_all_its_stages_are() -> None:
    state = ClusterState()
    state.apply(HeartbeatSeen(heartbeat(3, 1, num_stages=2), 0.0))
    assert state.ready_nodes == []
    state.apply(HeartbeatSeen(heartbeat(3, 0, num_stages=2, ready=False), 0.0))
    assert state.ready_nodes == []
    state.apply(HeartbeatSeen(heartbeat(3, 0, num_stages=2), 0.1))
    assert state.ready_nodes == [3]
    state.apply(HeartbeatSeen(heartbeat(3, 1, num_stages=2, ready=False), 0.2))
    assert state.ready_nodes == []


def test_a_node_whose_stages_hold_different_weights_is_not_ready() -> None:
    state = ClusterState()
    for whole, ready_nodes in ((False, []), (True, [3]), (False, [])):
        state.apply(HeartbeatSeen(heartbeat(3, 0, num_stages=2, whole=whole), 0.0))
        state.apply(HeartbeatSeen(heartbeat(3, 1, num_stages=2, whole=False), 0.0))
        assert state.ready_nodes == ready_nodes


def test_stages_that_disagree_on_their_number_make_no_node() -> None:
    state = ClusterState()
    state.apply(HeartbeatSeen(heartbeat(0, 0, num_stages=2), 0.0))
    state.apply(HeartbeatSeen(heartbeat(0, 1, num_stages=3), 0.0))
    assert state.ready_nodes == []


def test_ready_nodes_are_ascending() -> None:
    assert with_nodes(5, 1, 3).ready_nodes == [1, 3, 5]


def test_a_silent_stage_takes_its_node_and_tasks_with_it() -> None:
    state = with_nodes(0, 1)
    state.apply(HeartbeatSeen(heartbeat(1), 1.0))
    state.apply(TaskAssigned(task("t0", 0)))
    state.apply(TaskAssigned(task("t1", 1)))
    assert state.apply(TimePassed(LOST_AFTER_S - 0.01)) == []
    assert state.apply(TimePassed(LOST_AFTER_S)) == [
        LostTask(task("t0", 0), "stage 0 of node 0 was silent for 3 s")
    ]
    assert state.ready_nodes == [1]
    assert state.placed("t0") is None
    assert state.placed("t1") == task("t1", 1)
    assert [node.node for node in state.status()] == [1]


def test_one_silent_stage_of_two_leaves_the_other_in_the_status() -> None:
    state = ClusterState()
    state.apply(HeartbeatSeen(heartbeat(0, 0, num_stages=2), 0.0))
    state.apply(HeartbeatSeen(heartbeat(0, 1, num_stages=2), 2.0))
    state.apply(TimePassed(LOST_AFTER_S))
    (node,) = state.status()
    assert (node.ready, [beat.stage for beat in node.stages]) == (False, [1])


def test_a_restarted_stage_costs_the_tasks_of_its_node() -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(task("t")))
    assert state.apply(HeartbeatSeen(heartbeat(0, instance="b"), 1.0)) == [
        LostTask(task("t"), "stage 0 of node 0 restarted")
    ]
    assert state.ready_nodes == [0]
    assert state.apply(HeartbeatSeen(heartbeat(0, instance="b"), 2.0)) == []


def test_a_stage_that_leaves_costs_the_tasks_of_its_node() -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(task("t")))
    lost = state.apply(StageLeft(StageStopped(node=0, stage=0, instance="a")))
    assert lost == [LostTask(task("t"), "stage 0 of node 0 was stopped")]
    assert state.num_nodes == 0
    assert state.apply(TimePassed(100.0)) == []


@pytest.mark.parametrize(("node", "instance"), [(0, "earlier"), (9, "a")])
def test_the_end_of_a_stage_that_is_not_there_changes_nothing(node: int, instance: str) -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(task("t")))
    assert state.apply(StageLeft(StageStopped(node=node, stage=0, instance=instance))) == []
    assert state.ready_nodes == [0]
    assert state.placed("t") is not None


def test_training_tasks_leave_with_their_node_but_are_not_reported() -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(task("b", kind="training")))
    assert state.apply(TimePassed(LOST_AFTER_S)) == []
    assert state.placed("b") is None


def test_ended_tasks_leave_and_unknown_ones_are_ignored() -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(task("t")))
    state.apply(TaskAssigned(task("b", kind="training")))
    (before,) = state.status()
    assert (before.inference_tasks, before.training_tasks) == (1, 1)
    state.apply(TasksEnded(("t", "never heard of")))
    assert state.num_tasks(0) == 1
    assert state.placed("t") is None


def test_an_overdue_task_leaves_unasked() -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(task("t", overdue_s=2.0)))
    state.apply(TimePassed(1.9))
    assert state.num_tasks(0) == 1
    assert state.apply(TimePassed(2.0)) == []
    assert state.num_tasks(0) == 0


def test_the_deadline_of_an_ended_task_does_not_end_its_successor() -> None:
    state = with_nodes(0)
    state.apply(TaskAssigned(task("t", overdue_s=1.0)))
    state.apply(TasksEnded(("t",)))
    state.apply(TaskAssigned(task("t", overdue_s=2.0)))
    state.apply(TimePassed(1.5))
    assert state.num_tasks(0) == 1
