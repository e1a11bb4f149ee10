"""Simulated nodes that differ, and change while they work."""

from dataclasses import replace

import pytest

from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.node_events import NodeEvent
from lemix.simulation.record import RequestRecord
from lemix.simulation.run import simulate
from lemix.simulation.workload import WorkloadOptions
from shared.errors import ConfigurationError

CLUSTER = SimulationOptions(
    nodes=2, stages=2, profile="gpt2-large@rtx6000ada", policy="round_robin", hop_s=0.0001
)
WORKLOAD = WorkloadOptions(num_tasks=200, training_rate=0, rate_per_s=10.0, max_tokens=(4, 4))


def requests_with(*events: NodeEvent, **options: object) -> tuple[RequestRecord, ...]:
    record, _ = simulate(replace(CLUSTER, events=events, **options), WORKLOAD)
    return record.requests


def nodes_between(requests: tuple[RequestRecord, ...], start_s: float, end_s: float) -> set[int | None]:
    return {node for each in requests if start_s <= each.arrived_s < end_s for node in each.nodes}


def span_s(requests: tuple[RequestRecord, ...], node: int, start_s: float, end_s: float) -> float:
    """The shortest of the answers by the node to requests of that time."""
    return min(
        each.ended_s - each.arrived_s
        for each in requests
        if start_s <= each.arrived_s < end_s and each.nodes == (node,)
    )


@pytest.mark.parametrize("kind", ["leave", "fail"])
def test_a_node_that_goes_gets_nothing_until_it_joins_again(kind: str) -> None:
    requests = requests_with(NodeEvent(at_s=4, kind=kind, node=1), NodeEvent(at_s=12, kind="join", node=1))
    assert nodes_between(requests, 0, 4) == {0, 1}
    assert nodes_between(requests, 8, 12) == {0}
    assert nodes_between(requests, 13, 100) == {0, 1}


def test_a_node_that_joins_takes_its_part() -> None:
    requests = requests_with(NodeEvent(at_s=8, kind="join", node=2))
    assert nodes_between(requests, 0, 8) == {0, 1}
    assert nodes_between(requests, 9, 100) == {0, 1, 2}
    assert not any(each.error for each in requests)


def test_a_node_that_becomes_slow_takes_so_much_longer() -> None:
    requests = requests_with(NodeEvent(at_s=8, kind="slow", node=1, factor=30.0))
    assert span_s(requests, 1, 0, 8) == pytest.approx(span_s(requests, 0, 0, 8), rel=0.2)
    assert span_s(requests, 1, 8, 100) > 10 * span_s(requests, 1, 0, 8)
    assert span_s(requests, 0, 8, 100) == pytest.approx(span_s(requests, 0, 0, 8), rel=0.2)


def test_a_node_of_another_profile_is_as_fast_as_that_says() -> None:
    requests = requests_with(node_profiles={1: "gpt2-large@h200"})
    assert span_s(requests, 1, 0, 100) < 0.7 * span_s(requests, 0, 0, 100)


def test_forecasts_know_the_profile_that_a_node_tells() -> None:
    cluster = replace(CLUSTER, policy="lemix", node_profiles={1: "gpt2-large@h200"})
    _, metrics = simulate(cluster, replace(WORKLOAD, num_tasks=60))
    assert metrics.response_error is not None and metrics.response_error < 0.05


def test_nodes_of_two_models_are_an_error_that_names_both() -> None:
    with pytest.raises(ConfigurationError, match="gpt2-large and gpt2-medium"):
        requests_with(node_profiles={1: "gpt2-medium@h200"})
