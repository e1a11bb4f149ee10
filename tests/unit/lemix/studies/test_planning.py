"""The plan for a load, with runs that are made up."""

import math

import pytest

from lemix.studies.demand import SEEDS, Demand
from lemix.studies.grid import Cell
from lemix.studies.planning import Found, PlanOptions, answer, check_possible, lowest, plan_search
from lemix.studies.rows import Metrics, Row, Spread
from services.scheduler.objectives import Objectives
from shared.errors import ConfigurationError


def options(in_time: float = 0.99, **of_demand: object) -> PlanOptions:
    demand = {"profile": "gpt2-small@rtx6000ada", "rate_per_s": 100.0, "training_tokens_per_s": 0.0}
    return PlanOptions(
        demand=Demand(**{"num_requests": 20, **demand, **of_demand}), in_time=in_time, most_nodes=8
    )


def found(wanted: PlanOptions, capacity_per_node_s: float) -> Found:
    """As if each node bore so many requests a second, whatever else."""

    def metrics(cell: Cell) -> Metrics:
        rate = cell.workload.rate_per_s or 0.0
        return {"slo_attainment": 1.0 if rate <= capacity_per_node_s * cell.cluster.nodes else 0.5}

    search = plan_search(wanted)
    try:
        cells = next(search)
        while True:
            cells = search.send([metrics(cell) for cell in cells])
    except StopIteration as end:
        plan: Found = end.value
        return plan


@pytest.mark.parametrize("capacity_per_s", [13.0, 27.0, 40.0, 55.0, 500.0])
def test_a_plan_has_the_nodes_that_bear_the_load_and_the_rate_that_they_bear(capacity_per_s: float) -> None:
    plan = found(options(), capacity_per_s)
    nodes = math.ceil(100 / capacity_per_s)
    assert plan.nodes == nodes
    assert 100 <= plan.rate_per_s <= min(200, nodes * capacity_per_s)


def test_too_few_nodes_are_told_with_what_they_reached() -> None:
    wanted = options()
    plan = found(wanted, 5.0)
    assert plan.nodes is None
    row = Row({"nodes": 8}, {"slo_attainment": Spread(0.5, 0.4, 0.6)}, 5)
    with pytest.raises(
        ConfigurationError, match=r"^8 nodes are not enough: 50.0 \(40.0 to 60.0\) % in time;"
    ):
        list(answer(wanted, plan, [row]))


def test_an_answer_says_what_was_reached_the_margin_the_bound_and_the_seeds() -> None:
    wanted = options()
    rows = [
        Row({"nodes": 2, "rate": 100.0}, {"slo_attainment": Spread(0.97, 0.97, 0.98)}, 3),
        Row({"nodes": 3, "rate": 100.0}, {"slo_attainment": Spread(0.995, 0.99, 1.0)}, 5),
    ]
    text = "\n".join(answer(wanted, Found(3, 115.0), rows))
    assert text.startswith(
        "3 nodes of gpt2-small@rtx6000ada under lemix: 100 requests/s, 0 training tokens/s"
    )
    assert "reached: 99.5 (99.0 to 100.0) % in time" in text
    assert "with one fewer: 97.0 (97.0 to 98.0) % in time" in text
    assert "they bear 115 requests/s with the same" in text
    assert f"no policy gets by on fewer than {lowest(wanted)}" in text
    assert f"seeds {', '.join(map(str, SEEDS))}, 20 requests" in text


def test_what_no_number_of_nodes_can_do_is_refused_before_any_run() -> None:
    check_possible(options())
    with pytest.raises(ConfigurationError, match=r"0.0 % of the requests can be in time with a node to them"):
        check_possible(options(objectives=Objectives(ttft_s=0.0001)))
    with pytest.raises(ConfigurationError, match=r"a token takes .* ms with a node to itself.* 0.01 ms are"):
        check_possible(options(max_tokens=(4, 8), tbt_p99_s=0.00001))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate_per_s": 0.0}, "rate must be above 0, not 0"),
        ({"training_tokens_per_s": -1.0}, "training must be at least 0, not -1"),
        ({"in_time": 1.5}, "in_time must be a share above 0 and at most 1, not 1.5"),
    ],
)
def test_a_senseless_wish_is_refused_by_name(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        options(**changes)
