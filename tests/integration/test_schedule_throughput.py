"""What schedules make of four equal stages, as `python -m benchmarks schedules` measures it: virtual time."""

from functools import cache
from typing import Any

import pytest

from benchmarks.schedules import STAGES, bound_tokens_per_s, measure
from shared.schedule import ScheduleName

measured = cache(measure)


def of(schedule: ScheduleName, microbatches: int) -> dict[str, Any]:
    return measured(schedule, microbatches)


def test_without_flush_a_pipeline_trains_half_as_much_again_as_gpipe() -> None:
    assert of("async", 4)["tokens_per_s"] >= 1.5 * of("gpipe", 4)["tokens_per_s"]


def test_with_many_microbatches_it_comes_near_the_bound_without_bubbles() -> None:
    assert 0.95 <= of("async", 16)["tokens_per_s"] / bound_tokens_per_s(16) <= 1.0


def test_1f1b_holds_as_many_activations_as_there_are_stages_and_gpipe_as_microbatches() -> None:
    assert (of("1f1b", 16)["peak_microbatches"], of("gpipe", 16)["peak_microbatches"]) == (STAGES, 16)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "async"])
@pytest.mark.parametrize("microbatches", [4, 16])
def test_stages_are_idle_for_the_textbook_s_share(schedule: ScheduleName, microbatches: int) -> None:
    row = of(schedule, microbatches)
    assert row["idle_share"] == pytest.approx(row["textbook_idle_share"], abs=0.03)
