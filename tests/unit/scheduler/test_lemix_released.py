"""The released policy on a cluster: its score decides, and it parks batches that would be late."""

import pytest

from services.scheduler.costs import costs_named
from services.scheduler.policies import policy_named
from services.scheduler.policies.base import Place, Wait
from services.scheduler.state import ClusterState
from tests.support.policies import SLO_S, ask, batch, cluster, request, submit


def quadratic(*nodes: int) -> ClusterState:
    """Two stages each; forwards of 2e-6 L^2, backwards of 1e-6 L^2 seconds."""
    return cluster(*nodes, costs=costs_named("quadratic", None, 0.0))


def released(options: str = "") -> object:
    return policy_named(f"lemix_released{options}", lambda: 0.0)


def test_of_equal_nodes_the_lowest_is_taken() -> None:
    place = submit(quadratic(0, 1, 2), released(), batch("b", 200), 0.0)
    assert isinstance(place, Place) and place.node == 0


def test_a_request_joins_the_slower_node_as_the_released_score_has_it() -> None:
    # Worked out in test_released_score.py: -0.2 / (0.15 * 0.09) on the node that trains, -0.2 / (0.15 * 0.02)
    # on an idle one.
    state = quadratic(0, 1)
    submit(state, released(), batch("b", 200), 0.0)
    place = ask(state, released(), request("r", 100), 0.05)
    assert isinstance(place, Place) and place.node == 0
    assert place.forecast.forward == (pytest.approx((0.08, 0.10)), pytest.approx((0.12, 0.14)))


def test_a_batch_whose_forward_would_be_late_is_parked() -> None:
    # F = 2e-6 * 1000^2 = 2, the response time on an idle node; the objective is 1.
    decision = ask(quadratic(0), released(), batch("b", 1000), 5.0)
    assert isinstance(decision, Wait) and decision.until_s == pytest.approx(5.0 + 2.0 - SLO_S)
    assert isinstance(ask(quadratic(0), released(":park=off"), batch("b", 1000), 5.0), Place)
    assert isinstance(ask(quadratic(0), released(), request("r", 1000), 5.0), Place)
