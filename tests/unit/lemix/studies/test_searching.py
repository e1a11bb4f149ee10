"""Searches, against trying every number; the runs are made up."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemix.studies.grid import Cell, Search
from lemix.studies.rows import Metrics
from lemix.studies.searching import (
    Objective,
    Outcome,
    Steps,
    fewest_nodes,
    fewest_of_both,
    greatest,
    highest_of_split,
    judged,
    least,
)
from tests.unit.lemix.studies.support import cell_of

OBJECTIVE = Objective(in_time=0.95)
SEEDS = range(5)


def runs(nodes: int, training: int = 0) -> list[Cell]:
    return [cell_of("lemix", seed=seed, nodes=nodes, training=training) for seed in SEEDS]


def made(search: Search, metrics_of: Callable[[Cell], Metrics]) -> list[Cell]:
    """Every run that the search wants, with made up metrics."""
    wanted: list[Cell] = []
    try:
        cells = next(search)
        while True:
            wanted += cells
            cells = search.send([metrics_of(cell) for cell in cells])
    except StopIteration:
        return wanted


def result_of(number: Steps[int | None]) -> int | None:
    try:
        next(number)
        while True:
            number.send([])
    except StopIteration as end:
        found: int | None = end.value
        return found


def meets_from(lowest: int, tried: list[int]) -> Callable[[int], Steps[bool]]:
    def meets(number: int) -> Steps[bool]:
        tried.append(number)
        yield []
        return number >= lowest

    return meets


@given(st.integers(1, 5), st.integers(0, 20), st.integers(0, 30))
def test_the_least_number_is_that_of_trying_all_and_none_is_tried_twice(
    low: int, span: int, lowest: int
) -> None:
    tried: list[int] = []
    found = result_of(least(meets_from(lowest, tried), low, low + span))
    assert found == next((number for number in range(low, low + span + 1) if number >= lowest), None)
    assert len(tried) == len(set(tried)) and set(tried) <= set(range(low, low + span + 1))


@given(st.integers(0, 31), st.integers(-1, 31))
def test_the_greatest_number_is_that_of_trying_all(high: int, highest: int) -> None:
    def meets(number: int) -> Steps[bool]:
        yield []
        return number <= highest

    found = result_of(greatest(meets, 0, high))
    assert found == max((number for number in range(high + 1) if number <= highest), default=None)


def outcome_of(by_seed: list[Metrics]) -> tuple[Outcome, int]:
    part, num_runs = judged(OBJECTIVE, runs(1)), 0
    try:
        cells = next(part)
        while True:
            begun = num_runs
            num_runs += len(cells)
            cells = part.send(by_seed[begun:num_runs])
    except StopIteration as end:
        return end.value, num_runs


def run(in_time: float, kept: float = 1.0) -> Metrics:
    return {"slo_attainment": in_time, "training_kept": kept}


def test_a_setting_is_judged_by_most_of_its_seeds_and_no_more_are_run() -> None:
    assert outcome_of([run(1.0)] * 5) == (Outcome(serves=True, trains=True), 3)
    assert outcome_of([run(1.0, kept=0.9)] * 5) == (Outcome(serves=True, trains=False), 3)
    mixed = [run(1.0), run(0.9), run(0.9), run(1.0), run(0.96)]
    assert outcome_of(mixed) == (Outcome(serves=True, trains=True), 5)


def test_the_time_between_tokens_counts_where_there_is_an_objective_for_it() -> None:
    slow = {"slo_attainment": 1.0, "tbt_p99_s": 0.3}
    assert Objective(in_time=0.95).is_served(slow)
    assert not Objective(in_time=0.95, tbt_p99_s=0.2).is_served(slow)
    assert Objective(in_time=0.95, tbt_p99_s=0.3).is_served(slow)


def test_the_fewest_nodes_for_each_objective_get_all_seeds() -> None:
    """Attainment grows with nodes: 95 % from three on, 99 % from five."""

    def metrics(cell: Cell) -> Metrics:
        return run((0.8, 0.9, 0.96, 0.98, 1.0, 1.0, 1.0, 1.0)[int(cell.labels["nodes"]) - 1])

    objectives = [Objective(in_time=0.95), Objective(in_time=0.99)]
    wanted = made(fewest_nodes(objectives, runs, 1, 8), metrics)
    seeds_run = {
        nodes: {cell.cluster.seed for cell in wanted if cell.labels["nodes"] == nodes}
        for nodes in {cell.labels["nodes"] for cell in wanted}
    }
    assert seeds_run[3] == seeds_run[5] == set(SEEDS)
    assert seeds_run[2] == {0, 1, 2}, "most of three say no"


@pytest.mark.parametrize(("serving", "training"), [(1, 1), (3, 2), (5, 1), (2, 4)])
def test_the_best_split_has_as_few_of_each_kind_as_will_do(serving: int, training: int) -> None:
    def pools(serve: int, train: int) -> list[Cell]:
        return [cell_of("separate", seed=seed, serve=serve, train=train) for seed in SEEDS]

    def metrics(cell: Cell) -> Metrics:
        return run(
            1.0 if int(cell.labels["serve"]) >= serving else 0.5,
            kept=1.0 if int(cell.labels["train"]) >= training else 0.5,
        )

    wanted = made(fewest_of_both([OBJECTIVE], pools, 1, 10), metrics)
    answer = wanted[-1].labels
    assert (answer["serve"], answer["train"]) == (serving, training)


def test_the_highest_rate_of_a_split_leaves_the_training_the_nodes_that_it_needs() -> None:
    def metrics(cell: Cell) -> Metrics:
        rate, training = int(cell.labels["nodes"]), int(cell.labels["training"])
        return run(1.0 if rate <= 6 * (4 - training) else 0.5, kept=1.0 if training >= 2 else 0.5)

    wanted = made(highest_of_split(OBJECTIVE, runs, 32, 4), metrics)
    assert (wanted[-1].labels["nodes"], wanted[-1].labels["training"]) == (12, 2)
