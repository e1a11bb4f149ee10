"""What holds for every prediction, whatever lies on a node."""

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from services.scheduler.forecast import forecast_inference, forecast_training, inference_alone, training_alone
from services.scheduler.node.known_work import (
    BACKWARD,
    FORWARD,
    ITERATION,
    STEP,
    Op,
)
from services.scheduler.node.prediction import Prediction
from shared.profiles.times import work_of_rows
from shared.settings import MAX_ITERATION_TOKENS
from tests.support.courses import Load, Past, UnevenCosts, node_after, ops_after

STAGES = st.integers(1, 4)
HOPS = st.sampled_from([0.0, 0.0005])
EACH_ITS_OWN = (0, 1, 2, 3)
DEVICES = st.sampled_from([EACH_ITS_OWN, (0, 0, 0, 0), (0, 0, 2, 2), (0, 1, 1, 1)])
"""By stage: the first one on its device."""
PROMPTS = st.lists(st.integers(1, 1200), max_size=6)
BATCHES = st.lists(st.lists(st.integers(1, 900), min_size=1, max_size=4), max_size=3)
LOADS = st.builds(Load, prompts=PROMPTS, batches=BATCHES)
PASTS = st.builds(
    Past, at_s=st.sampled_from([0.0, 0.1, 1234.567]), first=LOADS, pause_s=st.floats(0, 3), second=LOADS
)
"""The node is asked at some time, in the middle of what it does."""
SLICES = st.sampled_from([1, 3, 8])
SLACK_S = 1e-9

quick = settings(max_examples=60)


def spans(course: Prediction) -> dict[tuple[int, int, int], dict[int, tuple[float, float]]]:
    """(kind, flow, microbatch) -> stage -> (start, end)."""
    found: dict[tuple[int, int, int], dict[int, tuple[float, float]]] = defaultdict(dict)
    for stage, ops in enumerate(course.ops):
        for op, start_s, end_s in zip(ops, course.starts_s[stage], course.ends_s[stage], strict=True):
            by_stage = found[op.kind, id(op.flow), op.microbatch]
            by_stage[stage] = (by_stage.get(stage, (start_s, end_s))[0], end_s)
    return found


def aside_at_first(ops: list[Op]) -> list[Op]:
    """The rests of ops that stood aside before the prediction begins."""
    seen, left = set[tuple[int, int, int]](), []
    for op in ops:
        key = (op.kind, id(op.flow), op.microbatch)
        if op.done_s and key not in seen:
            left.append(op)
        seen.add(key)
    return left


@quick
@given(PASTS, STAGES, HOPS, DEVICES, SLICES)
def test_a_device_does_one_thing_at_a_time(
    past: Past, num_stages: int, hop_s: float, devices: tuple[int, ...], num_slices: int
) -> None:
    course = node_after(
        past, num_stages=num_stages, hop_s=hop_s, devices=devices, num_slices=num_slices
    ).prediction
    for device in set(devices[:num_stages]):
        on_it = [stage for stage in range(num_stages) if devices[stage] == device]
        spans = sorted(
            span for stage in on_it for span in zip(course.starts_s[stage], course.ends_s[stage], strict=True)
        )
        assert all(end_s <= start_s for (_, end_s), (start_s, _) in pairwise(spans))


@quick
@given(PASTS, STAGES, HOPS, DEVICES, SLICES)
def test_everything_known_is_done_once(
    past: Past, num_stages: int, hop_s: float, devices: tuple[int, ...], num_slices: int
) -> None:
    costs = UnevenCosts(num_stages, hop_s)
    node = node_after(past, num_stages=num_stages, hop_s=hop_s, devices=devices, num_slices=num_slices)
    course = node.prediction
    assert {task_id for task_id, at_s in course.first_tokens_s.items() if at_s > node.told_s} == node.waiting
    for stage in range(num_stages):
        works = [work_of_rows(0, tokens) for batch in past.batches for tokens in batch]
        wanted_s = (
            costs.iteration_s(stage, work_of_rows(0, sum(past.prompts)))
            + sum(costs.forward_s(stage, work) + costs.backward_s(stage, work) for work in works)
            + costs.step_s(stage) * len(past.batches)
        )
        planned = list(zip(course.ops[stage], course.starts_s[stage], course.ends_s[stage], strict=True))
        left_s = sum(op.duration_s for op, _, end_s in planned if end_s > node.told_s)
        left_s += sum(op.done_s for op in aside_at_first(course.ops[stage]))
        assert node.done_s[stage] + left_s == pytest.approx(wanted_s)
        assert all(end_s - start_s == pytest.approx(op.duration_s) for op, start_s, end_s in planned)


@quick
@given(PASTS, STAGES, HOPS, DEVICES, SLICES)
def test_every_dependency_is_kept(
    past: Past, num_stages: int, hop_s: float, devices: tuple[int, ...], num_slices: int
) -> None:
    last = num_stages - 1
    course = node_after(
        past, num_stages=num_stages, hop_s=hop_s, devices=devices, num_slices=num_slices
    ).prediction
    hop_between_s = course.known.hop_between_s
    found = spans(course)
    for (kind, flow, microbatch), by_stage in found.items():
        if kind in (ITERATION, FORWARD):
            for stage in sorted(by_stage.keys() - {last}):  # those before are over
                assert (
                    by_stage[stage + 1][0] >= by_stage[stage][1] + hop_between_s(stage, stage + 1) - SLACK_S
                )
        if kind == FORWARD and num_stages > 1:
            turned_s = by_stage[last][1] + hop_between_s(last, last - 1)
            assert found[BACKWARD, flow, microbatch][last - 1][0] >= turned_s - SLACK_S
        if kind == BACKWARD:
            for stage in range(max(by_stage)):
                assert (
                    by_stage[stage][0] >= by_stage[stage + 1][1] + hop_between_s(stage + 1, stage) - SLACK_S
                )
        if kind == STEP:
            for stage, (start_s, _) in by_stage.items():
                ends = [
                    each[stage][1]
                    for (other, owner, _), each in found.items()
                    if owner == flow and stage in each and other in (FORWARD, BACKWARD)
                ]
                assert start_s >= max(ends, default=start_s) - SLACK_S


@quick
@given(PASTS, STAGES, HOPS, DEVICES, SLICES)
def test_no_more_is_in_flight_than_stages(
    past: Past, num_stages: int, hop_s: float, devices: tuple[int, ...], num_slices: int
) -> None:
    course = node_after(
        past, num_stages=num_stages, hop_s=hop_s, devices=devices, num_slices=num_slices
    ).prediction
    found, last = spans(course), num_stages - 1
    iterations = [
        (by[0][0] if 0 in by else course.at_s, by[last][1])
        for (kind, _, _), by in found.items()
        if kind == ITERATION
    ]
    ends_at = BACKWARD if num_stages > 1 else FORWARD
    microbatches = [
        (found[FORWARD, flow, index].get(0, (course.at_s,))[0], by[0][1])
        for (kind, flow, index), by in list(found.items())
        if kind == ends_at
    ]
    for lives in (iterations, microbatches):
        for at_s, _ in lives:
            assert sum(start_s <= at_s < end_s - SLACK_S for start_s, end_s in lives) <= num_stages


@quick
@example(Past(second=Load(prompts=[1, 1, 1, 1021, 2])), 1, 0.0, EACH_ITS_OWN, 1, 1.0)
@example(Past(first=Load(prompts=[1, 987, 1, 512]), pause_s=1.0), 3, 0.0, EACH_ITS_OWN, 1, 1.0)
@given(PASTS, STAGES, HOPS, DEVICES, SLICES, st.floats(0, 3))
def test_what_happens_as_predicted_leaves_the_rest_as_predicted(
    past: Past, num_stages: int, hop_s: float, devices: tuple[int, ...], num_slices: int, for_s: float
) -> None:
    assume(hop_s or devices == EACH_ITS_OWN)  # else a message to another device comes sooner than a near one
    node = node_after(past, num_stages=num_stages, hop_s=hop_s, devices=devices, num_slices=num_slices)
    before, until_s = node.prediction, node.now_s + for_s
    node.go_on(until_s)
    after = list(ops_after(node.prediction, until_s))
    expected = list(ops_after(before, until_s))
    assert [each[:2] for each in after] == [each[:2] for each in expected]
    assert [each[2:] for each in after] == [pytest.approx(each[2:], abs=1e-6) for each in expected]


@quick
@given(st.integers(1, MAX_ITERATION_TOKENS), STAGES, HOPS, st.floats(0, 100))
def test_on_an_empty_node_a_request_takes_its_costs_and_hops(
    tokens: int, num_stages: int, hop_s: float, now_s: float
) -> None:
    costs = UnevenCosts(num_stages, hop_s)
    empty = node_after(Past(), num_stages=num_stages, hop_s=hop_s).prediction
    forecast = forecast_inference(empty, inference_alone(costs, tokens), now_s)
    device_s = sum(costs.iteration_s(stage, work_of_rows(0, tokens)) for stage in range(num_stages))
    assert forecast.end_s - now_s == pytest.approx(device_s + num_stages * hop_s)


@quick
@given(st.integers(1, 900), STAGES, HOPS, st.floats(0, 100))
def test_on_an_empty_node_a_microbatch_takes_its_costs_and_hops(
    tokens: int, num_stages: int, hop_s: float, now_s: float
) -> None:
    costs, work = UnevenCosts(num_stages, hop_s), work_of_rows(0, tokens)
    empty = node_after(Past(), num_stages=num_stages, hop_s=hop_s).prediction
    forecast = forecast_training(empty, training_alone(costs, [work]), now_s)
    stages = range(num_stages)
    device_s = sum(costs.forward_s(stage, work) + costs.backward_s(stage, work) for stage in stages)
    hops = 2 + 2 * (num_stages - 1)
    assert forecast.backward[0].end_s - now_s == pytest.approx(device_s + hops * hop_s)


@quick
@given(PASTS, STAGES, HOPS, st.integers(1, 900))
def test_forecasting_changes_nothing(past: Past, num_stages: int, hop_s: float, tokens: int) -> None:
    costs = UnevenCosts(num_stages, hop_s)
    node = node_after(past, num_stages=num_stages, hop_s=hop_s)
    before = _copy(node.prediction)
    first = forecast_inference(node.prediction, inference_alone(costs, tokens), node.now_s + 0.1)
    forecast_training(node.prediction, training_alone(costs, [work_of_rows(0, tokens)]), node.now_s + 0.1)
    assert _copy(node.prediction) == before
    assert forecast_inference(node.prediction, inference_alone(costs, tokens), node.now_s + 0.1) == first


def _copy(
    course: Prediction,
) -> tuple[list[list[Op]], list[list[float]], list[list[float]], dict[str, float]]:
    starts_s, ends_s = ([list(each) for each in times] for times in (course.starts_s, course.ends_s))
    return [list(ops) for ops in course.ops], starts_s, ends_s, dict(course.first_tokens_s)
