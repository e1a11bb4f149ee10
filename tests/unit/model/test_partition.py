from itertools import combinations

import pytest

from shared.errors import ConfigurationError
from shared.model.partition import LayerRange, partition


def counts(ranges: tuple[LayerRange, ...]) -> list[int]:
    return [layers.num_layers for layers in ranges]


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "head_cost", "expected"),
    [
        (8, 1, 0.0, [8]),
        (8, 2, 0.0, [4, 4]),
        (8, 2, 2.7, [5, 3]),
        (5, 3, 0.0, [2, 2, 1]),
        (12, 2, 2.6, [7, 5]),
        (4, 4, 100.0, [1, 1, 1, 1]),
        (5, 2, 100.0, [4, 1]),
    ],
)
def test_stages_are_even_in_cost(
    num_layers: int, num_stages: int, head_cost: float, expected: list[int]
) -> None:
    assert counts(partition(num_layers, num_stages, head_cost=head_cost)) == expected


@pytest.mark.parametrize("num_layers", [3, 7, 10])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("head_cost", [0.0, 0.4, 3.0, 50.0])
def test_no_cut_has_a_cheaper_dearest_stage(num_layers: int, num_stages: int, head_cost: float) -> None:
    def dearest(stage_counts: list[int]) -> float:
        return max([*stage_counts[:-1], stage_counts[-1] + head_cost])

    all_cuts = (
        [end - start for start, end in zip((0, *cuts), (*cuts, num_layers), strict=True)]
        for cuts in combinations(range(1, num_layers), num_stages - 1)
    )
    found = counts(partition(num_layers, num_stages, head_cost=head_cost))
    assert dearest(found) == min(map(dearest, all_cuts))


def test_ranges_cover_the_layers_once() -> None:
    ranges = partition(11, 4, head_cost=2.0)
    assert [number for layers in ranges for number in range(layers.first, layers.end)] == list(range(11))
    assert [layers.is_first for layers in ranges] == [True, False, False, False]
    assert [layers.is_last for layers in ranges] == [False, False, False, True]


@pytest.mark.parametrize("num_stages", [0, -1, 6])
def test_impossible_number_of_stages_is_refused(num_stages: int) -> None:
    with pytest.raises(ConfigurationError, match=f"num_stages={num_stages}"):
        partition(5, num_stages)
