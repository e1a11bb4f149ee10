"""What holds for every prediction, whatever lies on a node."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.forecast import forecast_inference, forecast_training, inference_alone, training_alone
from services.scheduler.node.known_work import (
    BACKWARD,
    FORWARD,
    ITERATION,
    MAX_ITERATION_TOKENS,
    STEP,
    Op,
)
from services.scheduler.node.prediction import Prediction
from shared.profiles.times import work_of_rows
from tests.support.courses import UnevenCosts, node_with, ops_after, tell

STAGES = st.integers(1, 4)
HOPS = st.sampled_from([0.0, 0.0005])
PROMPTS = st.lists(st.integers(1, 1200), max_size=6)
BATCHES = st.lists(st.lists(st.integers(1, 900), min_size=1, max_size=4), max_size=3)
SLACK_S = 1e-9

quick = settings(max_examples=60, deadline=None)


def spans(course: Prediction) -> dict[tuple[int, int, int], dict[int, tuple[float, float]]]:
    """(kind, flow, microbatch) -> stage -> (start, end)."""
    found: dict[tuple[int, int, int], dict[int, tuple[float, float]]] = defaultdict(dict)
    for stage, ops in enumerate(course.ops):
        for op, start_s, end_s in zip(ops, course.starts_s[stage], course.ends_s[stage], strict=True):
            found[op.kind, id(op.flow), op.microbatch][stage] = (start_s, end_s)
    return found


@quick
@given(PROMPTS, BATCHES, STAGES, HOPS)
def test_a_stage_does_one_thing_at_a_time(
    prompts: list[int], batches: list[list[int]], num_stages: int, hop_s: float
) -> None:
    course = node_with(prompts, batches, num_stages=num_stages, hop_s=hop_s).prediction
    for starts_s, ends_s in zip(course.starts_s, course.ends_s, strict=True):
        assert all(end_s <= start_s for end_s, start_s in zip(ends_s, starts_s[1:], strict=False))


@quick
@given(PROMPTS, BATCHES, STAGES, HOPS)
def test_everything_known_is_done_once(
    prompts: list[int], batches: list[list[int]], num_stages: int, hop_s: float
) -> None:
    costs = UnevenCosts(num_stages, hop_s)
    course = node_with(prompts, batches, num_stages=num_stages, hop_s=hop_s).prediction
    assert set(course.first_tokens_s) == {f"r{index}" for index in range(len(prompts))}
    for stage in range(num_stages):
        works = [work_of_rows(0, tokens) for batch in batches for tokens in batch]
        wanted_s = (
            costs.iteration_s(stage, work_of_rows(0, sum(prompts)))
            + sum(costs.forward_s(stage, work) + costs.backward_s(stage, work) for work in works)
            + costs.step_s(stage) * len(batches)
        )
        planned_s = sum(op.duration_s for op in course.ops[stage])
        assert planned_s == pytest.approx(wanted_s)
        taken = zip(course.starts_s[stage], course.ends_s[stage], strict=True)
        assert sum(end_s - start_s for start_s, end_s in taken) == pytest.approx(wanted_s)


@quick
@given(PROMPTS, BATCHES, STAGES, HOPS)
def test_every_dependency_is_kept(
    prompts: list[int], batches: list[list[int]], num_stages: int, hop_s: float
) -> None:
    last = num_stages - 1
    course = node_with(prompts, batches, num_stages=num_stages, hop_s=hop_s).prediction
    found = spans(course)
    for (kind, flow, microbatch), by_stage in found.items():
        if kind in (ITERATION, FORWARD):
            for stage in range(last):
                assert by_stage[stage + 1][0] >= by_stage[stage][1] + hop_s - SLACK_S
        if kind == FORWARD and num_stages > 1:
            backward = found[BACKWARD, flow, microbatch]
            assert backward[last - 1][0] >= by_stage[last][1] + hop_s - SLACK_S
            for stage in range(last - 1):
                assert backward[stage][0] >= backward[stage + 1][1] + hop_s - SLACK_S
        if kind == STEP:
            for stage, (start_s, _) in by_stage.items():
                ends = [
                    each[stage][1]
                    for (other, owner, _), each in found.items()
                    if owner == flow and stage in each and other in (FORWARD, BACKWARD)
                ]
                assert start_s >= max(ends) - SLACK_S


@quick
@given(PROMPTS, BATCHES, STAGES, HOPS)
def test_no_more_is_in_flight_than_stages(
    prompts: list[int], batches: list[list[int]], num_stages: int, hop_s: float
) -> None:
    found = spans(node_with(prompts, batches, num_stages=num_stages, hop_s=hop_s).prediction)
    last = num_stages - 1
    iterations = [(by[0][0], by[last][1]) for (kind, _, _), by in found.items() if kind == ITERATION]
    microbatches = [
        (by[0][0], found[BACKWARD, flow, index][0][1] if num_stages > 1 else by[0][1])
        for (kind, flow, index), by in found.items()
        if kind == FORWARD
    ]
    for lives in (iterations, microbatches):
        for at_s, _ in lives:
            assert sum(start_s <= at_s < end_s - SLACK_S for start_s, end_s in lives) <= num_stages


@quick
@given(PROMPTS, BATCHES, STAGES, HOPS, st.floats(0, 3))
def test_what_happens_as_predicted_leaves_the_rest_as_predicted(
    prompts: list[int], batches: list[list[int]], num_stages: int, hop_s: float, until_s: float
) -> None:
    timeline = node_with(prompts, batches, num_stages=num_stages, hop_s=hop_s)
    before = timeline.prediction
    tell(timeline, before, until_s, hop_s)
    after = list(ops_after(timeline.prediction, until_s))
    expected = list(ops_after(before, until_s))
    assert [each[:2] for each in after] == [each[:2] for each in expected]
    assert [each[2:] for each in after] == [pytest.approx(each[2:], abs=1e-6) for each in expected]


@quick
@given(st.integers(1, MAX_ITERATION_TOKENS), STAGES, HOPS, st.floats(0, 100))
def test_on_an_empty_node_a_request_takes_its_costs_and_hops(
    tokens: int, num_stages: int, hop_s: float, now_s: float
) -> None:
    costs = UnevenCosts(num_stages, hop_s)
    empty = node_with([], [], num_stages=num_stages, hop_s=hop_s).prediction
    forecast = forecast_inference(empty, inference_alone(costs, tokens), now_s)
    device_s = sum(costs.iteration_s(stage, work_of_rows(0, tokens)) for stage in range(num_stages))
    assert forecast.end_s - now_s == pytest.approx(device_s + num_stages * hop_s)


@quick
@given(st.integers(1, 900), STAGES, HOPS, st.floats(0, 100))
def test_on_an_empty_node_a_microbatch_takes_its_costs_and_hops(
    tokens: int, num_stages: int, hop_s: float, now_s: float
) -> None:
    costs, work = UnevenCosts(num_stages, hop_s), work_of_rows(0, tokens)
    empty = node_with([], [], num_stages=num_stages, hop_s=hop_s).prediction
    forecast = forecast_training(empty, training_alone(costs, [work]), now_s)
    stages = range(num_stages)
    device_s = sum(costs.forward_s(stage, work) + costs.backward_s(stage, work) for stage in stages)
    hops = 2 + 2 * (num_stages - 1)
    assert forecast.backward[0].end_s - now_s == pytest.approx(device_s + hops * hop_s)


@quick
@given(PROMPTS, BATCHES, STAGES, HOPS, st.integers(1, 900))
def test_forecasting_changes_nothing(
    prompts: list[int], batches: list[list[int]], num_stages: int, hop_s: float, tokens: int
) -> None:
    costs = UnevenCosts(num_stages, hop_s)
    timeline = node_with(prompts, batches, num_stages=num_stages, hop_s=hop_s)
    before = _copy(timeline.prediction)
    first = forecast_inference(timeline.prediction, inference_alone(costs, tokens), 0.1)
    forecast_training(timeline.prediction, training_alone(costs, [work_of_rows(0, tokens)]), 0.1)
    assert _copy(timeline.prediction) == before
    assert forecast_inference(timeline.prediction, inference_alone(costs, tokens), 0.1) == first


def _copy(
    course: Prediction,
) -> tuple[list[list[Op]], list[list[float]], list[list[float]], dict[str, float]]:
    starts_s, ends_s = ([list(each) for each in times] for times in (course.starts_s, course.ends_s))
    return [list(ops) for ops in course.ops], starts_s, ends_s, dict(course.first_tokens_s)
