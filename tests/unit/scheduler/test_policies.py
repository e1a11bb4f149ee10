"""Each policy chooses among ready nodes, changes nothing, and follows its own rule."""

import pytest

from services.scheduler.policies import POLICIES, policy_named
from services.scheduler.state import ClusterState, HeartbeatSeen, PlacedTask, TaskAssigned, TasksEnded
from shared.errors import ConfigurationError
from shared.messages.training import TrainingTask
from tests.support.cluster import heartbeat

TASK = TrainingTask(task_id="b", microbatch_tokens=(8,))


def cluster(*ready: int, unready: tuple[int, ...] = ()) -> ClusterState:
    state = ClusterState()
    for node in (*ready, *unready):
        state.apply(HeartbeatSeen(heartbeat(node, ready=node in ready), 0.0))
    return state


def place(state: ClusterState, policy: str, count: int) -> list[int]:
    """Place `count` tasks `t0`, `t1`, ...; the nodes chosen."""
    chosen = []
    for i in range(count):
        node = policy_named(policy).choose(state, TASK)
        assert node is not None
        state.apply(TaskAssigned(PlacedTask(task_id=f"t{i}", kind="inference", node=node)))
        chosen.append(node)
    return chosen


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_without_a_ready_node_there_is_no_choice(name: str) -> None:
    assert policy_named(name).choose(cluster(unready=(0, 1)), TASK) is None


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_choosing_changes_nothing_and_takes_only_ready_nodes(name: str) -> None:
    state = cluster(2, unready=(0, 1, 3))
    assert [policy_named(name).choose(state, TASK) for _ in range(3)] == [2, 2, 2]


def test_round_robin_takes_turns() -> None:
    assert place(cluster(0, 1, 4), "round_robin", 5) == [0, 1, 4, 0, 1]


def test_round_robin_goes_on_after_a_node_that_went_away() -> None:
    state = cluster(1, 2, 3)
    place(state, "round_robin", 2)
    state.apply(HeartbeatSeen(state.status()[1].stages[0].model_copy(update={"ready": False}), 0.0))
    assert policy_named("round_robin").choose(state, TASK) == 3


def test_least_loaded_follows_the_tasks_in_flight() -> None:
    state = cluster(0, 1)
    assert place(state, "least_loaded", 4) == [0, 1, 0, 1]
    state.apply(TasksEnded(("t1", "t3")))
    assert policy_named("least_loaded").choose(state, TASK) == 1


def test_an_unknown_policy_is_named_with_the_choices() -> None:
    with pytest.raises(ConfigurationError, match=r"'fastest'.*least_loaded, round_robin"):
        policy_named("fastest")
