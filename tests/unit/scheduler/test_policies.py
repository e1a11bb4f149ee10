"""Each policy chooses among ready nodes, changes nothing, and follows its own rule."""

import pytest
from msgspec import structs

from services.scheduler.events import HeartbeatSeen, TasksEnded
from services.scheduler.policies import POLICIES, policy_named
from services.scheduler.policies.base import Decision, Place, Refuse
from services.scheduler.state import ClusterState
from shared.errors import ConfigurationError
from tests.support.policies import ask, batch, cluster, request, submit


def choose(state: ClusterState, policy: str, draw: float = 0.0) -> Decision:
    return ask(state, policy_named(policy, lambda: draw), batch("b", 8), 0.0)


def place(state: ClusterState, policy: str, count: int) -> list[int]:
    """Place `count` requests `t0`, `t1`, ...; the nodes chosen."""
    chosen = []
    for i in range(count):
        decision = submit(state, policy_named(policy, lambda: 0.0), request(f"t{i}", 8), 0.0)
        assert isinstance(decision, Place)
        chosen.append(decision.node)
    return chosen


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_without_a_ready_node_a_task_is_refused_with_the_reason(name: str) -> None:
    assert choose(cluster(unready=(0, 1)), name) == Refuse(503, "no node is ready (2 known)")


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_choosing_changes_nothing_and_takes_only_ready_nodes(name: str) -> None:
    state = cluster(2, unready=(0, 1, 3))
    decisions = [choose(state, name) for _ in range(3)]
    assert [decision.node for decision in decisions if isinstance(decision, Place)] == [2, 2, 2]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_only_the_first_nodes_are_used_when_told(name: str) -> None:
    assert set(place(cluster(3, 4, 5, 6), f"{name}:nodes=2", 6)) <= {3, 4}


def test_round_robin_takes_turns() -> None:
    assert place(cluster(0, 1, 4), "round_robin", 5) == [0, 1, 4, 0, 1]
    assert place(cluster(0, 1, 4), "round_robin:nodes=2", 3) == [0, 1, 0]


def test_round_robin_goes_on_after_a_node_that_went_away() -> None:
    state = cluster(1, 2, 3)
    place(state, "round_robin", 2)
    state.apply(HeartbeatSeen(structs.replace(state.status()[1].stages[0], ready=False), 0.0))
    assert choose(state, "round_robin") == Place(3)


def test_least_loaded_follows_the_tasks_in_flight() -> None:
    state = cluster(0, 1)
    assert place(state, "least_loaded", 4) == [0, 1, 0, 1]
    state.apply(TasksEnded(("t1", "t3"), 0.0))
    assert choose(state, "least_loaded") == Place(1)


def place_in_turns(policy: str, num_nodes: int, rate_per_s: float = 1.0) -> tuple[list[int], list[int]]:
    """Four requests and four batches in turn, on nodes 0, 1, ...: where the requests and the batches go."""
    state, chosen = cluster(*range(num_nodes)), ([], [])
    for i in range(8):
        task = batch(f"t{i}", 8) if i % 2 else request(f"t{i}", 8)
        decision = submit(state, policy_named(policy, lambda: 0.0), task, i / rate_per_s)
        assert isinstance(decision, Place)
        chosen[i % 2].append(decision.node)
    return chosen


@pytest.mark.parametrize(
    ("split", "num_nodes", "serving", "training"),
    [
        ("0.1", 4, [0, 1, 2, 0], [3, 3, 3, 3]),  # round(0.4) = 0: one node trains all the same
        ("0.5", 4, [0, 1, 0, 1], [2, 3, 2, 3]),
        ("0.9", 4, [0, 0, 0, 0], [1, 2, 3, 1]),  # round(3.6) = 4: one node serves all the same
        ("0.5", 1, [0, 0, 0, 0], [0, 0, 0, 0]),
        ("dynamic", 1, [0, 0, 0, 0], [0, 0, 0, 0]),
        ("dynamic", 4, [0, 0, 0, 0], [1, 2, 3, 1]),
    ],
)
def test_separate_takes_turns_in_two_pools(
    split: str, num_nodes: int, serving: list[int], training: list[int]
) -> None:
    assert place_in_turns(f"separate:split={split}", num_nodes) == (serving, training)


def test_separate_gives_half_of_the_nodes_to_many_requests() -> None:
    state = cluster(0, 1, 2, 3)
    for i in range(32):  # in one second: 32 per second
        submit(state, policy_named("round_robin", lambda: 0.0), request(f"r{i}", 8), i / 32)
    nodes = [
        submit(state, policy_named("separate:split=dynamic", lambda: 0.0), batch(f"b{i}", 8), 1.0)
        for i in range(3)
    ]
    assert [place.node for place in nodes if isinstance(place, Place)] == [2, 3, 2]


def test_random_follows_the_generator_over_all_nodes() -> None:
    state = cluster(0, 5, 7)
    assert [choose(state, "random", draw) for draw in (0.0, 0.34, 0.99)] == [Place(0), Place(5), Place(7)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("fastest", r"'fastest'.*least_loaded, .*random, round_robin"),
        ("random:speed=3", r"'random' has no option 'speed'; choose from: nodes"),
        ("random:nodes=0", r"nodes='0': .*greater than 0"),
        ("random:nodes", r"'random:nodes' is not written as name:key=value"),
        ("random:nodes=1,nodes=2", r"not written as"),
        ("separate:split=2", r"split='2': .*'dynamic' or .*less than or equal to 1"),
        ("lemix:without=luck", r"without='luck': .*'idleness', .*'profile'"),
        ("lemix:score=best", r"score='best': .*'corrected' or 'paper'"),
    ],
)
def test_what_cannot_be_understood_is_named_with_the_choices(text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        policy_named(text, lambda: 0.0)
