"""The costs of nodes that are not alike."""

import random
from collections.abc import Sequence

import pytest

from services.scheduler.costs import AffineCosts, Costs
from services.scheduler.node_costs import NodeCosts
from shared.profiles.profile import profile_named
from shared.profiles.times import Work, work_of_rows

WORKS = [work_of_rows(0, tokens) for tokens in (20, 150, 500)]


def profiled() -> AffineCosts:
    return AffineCosts(profile_named("llama2-13b@a100", 2), hop_s=0.0005)


def run(nodes: Sequence[NodeCosts], factors: Sequence[float], ops: int, noise: float = 0.0) -> None:
    """Ops on both stages of every node in turn, so many times as long as the profile says."""
    truth, rng = profiled(), random.Random(0)
    for _ in range(ops):
        for costs, factor in zip(nodes, factors, strict=True):
            work = rng.choice(WORKS)
            for stage in (0, 1):
                real_s = factor * truth.iteration_s(stage, work) * rng.uniform(1 - noise, 1 + noise)
                costs.observe(stage, "iteration", work, real_s)


def nodes_of(shared: Costs, number: int) -> list[NodeCosts]:
    return [NodeCosts(shared, 2) for _ in range(number)]


@pytest.mark.parametrize("work", WORKS)
def test_each_node_is_forecast_by_its_own_ops(work: Work) -> None:
    nodes, factors = nodes_of(profiled(), 4), (1.0, 3.0, 1.0, 0.5)
    run(nodes, factors, ops=300)
    for costs, factor in zip(nodes, factors, strict=True):
        for stage in (0, 1):
            real_s = factor * profiled().iteration_s(stage, work)
            assert costs.iteration_s(stage, work) == pytest.approx(real_s, rel=0.1)


def test_nodes_that_differ_by_noise_stay_alike_and_those_that_really_differ_do_not() -> None:
    nodes = nodes_of(profiled(), 4)
    run(nodes, (1.0, 1.05, 0.95, 3.0), ops=300, noise=0.3)
    assert nodes[0].alike == nodes[1].alike == nodes[2].alike != nodes[3].alike
    assert nodes[3].slowness > 2 * nodes[0].slowness


def test_what_slows_all_nodes_down_leaves_them_alike() -> None:
    nodes = nodes_of(profiled(), 3)
    run(nodes, (1.5, 1.5, 1.5), ops=300)
    assert len({costs.alike for costs in nodes}) == 1
    assert nodes[0].iteration_s(0, WORKS[1]) == pytest.approx(
        1.5 * profiled().iteration_s(0, WORKS[1]), rel=0.1
    )


def test_a_node_without_history_is_as_most_others_are() -> None:
    shared = profiled()
    nodes = nodes_of(shared, 3)
    run(nodes, (3.0, 1.0, 1.0), ops=300)
    assert NodeCosts(shared, 2, nodes).alike == nodes[1].alike
    assert NodeCosts(shared, 2, nodes[:1]).slowness == pytest.approx(nodes[0].slowness, rel=0.1)


def test_a_node_that_becomes_fast_again_is_like_the_others_again() -> None:
    nodes = nodes_of(profiled(), 3)
    run(nodes, (3.0, 1.0, 1.0), ops=200)
    run(nodes, (1.0, 1.0, 1.0), ops=200)
    assert len({costs.alike for costs in nodes}) == 1


def test_curves_that_are_being_learnt_say_nothing_about_a_node() -> None:
    nodes = nodes_of(AffineCosts(None, hop_s=0.0), 2)
    for length in range(1, 100):
        for costs in nodes:
            costs.observe(0, "iteration", work_of_rows(0, length), 0.01 * length)
    assert nodes[0].alike == nodes[1].alike
    assert nodes[0].iteration_s(0, work_of_rows(0, 50)) == pytest.approx(0.5, rel=0.1)
