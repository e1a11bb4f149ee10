"""The bounds against brute force, and against what simple schedules reach."""

from dataclasses import dataclass
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemix.studies import bounds
from lemix.studies.bounds import Job, Pipelines, Request
from shared.profiles.times import Work


@dataclass(frozen=True)
class Linear:
    """`token_s` a row and `fixed_s` an op; a backward twice a forward; a step of 1 s."""

    token_s: float = 0.01
    fixed_s: float = 0.0

    def iteration_s(self, work: Work) -> float:
        return self.fixed_s + self.token_s * work.num_tokens

    def forward_s(self, work: Work) -> float:
        return self.iteration_s(work)

    def backward_s(self, work: Work) -> float:
        return 2 * self.iteration_s(work)

    def step_s(self) -> float:
        return 1.0


def pipelines(*times: Linear, nodes: int = 1, hop_s: float = 0.0) -> Pipelines:
    return Pipelines(nodes=nodes, times=times, hop_s=hop_s, max_iteration_tokens=512)


def feasible(jobs: tuple[Job, ...]) -> bool:
    """In the order of their dues; releases have the same order, so no other order does better."""
    now_s = float("-inf")
    for job in jobs:
        now_s = max(now_s, job.release_s) + job.length_s
        if now_s > job.due_s:
            return False
    return True


def most_by_trying(jobs: list[Job]) -> int:
    return max(
        size for size in range(len(jobs) + 1) for chosen in combinations(jobs, size) if feasible(chosen)
    )


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(0, 3)), max_size=9),
    st.integers(1, 8),
)
def test_as_many_jobs_are_on_time_as_the_best_subset_has(
    drawn: list[tuple[int, int, int]], slack: int
) -> None:
    jobs, release, due = [], 0, 0
    for gap, length, extra in drawn:
        release += gap
        due = max(due, release + slack) + extra
        jobs.append(Job(float(release), float(length), float(due)))
    assert bounds.num_on_time(jobs) == most_by_trying(jobs)


def test_the_first_token_takes_every_stage_and_the_hops_between() -> None:
    alone = pipelines(Linear(), Linear(token_s=0.02), Linear(), hop_s=0.5)
    assert bounds.ttft_s(alone, 100) == pytest.approx(1 + 2 + 1 + 2 * 0.5)


def test_behind_stage_0_a_long_prompt_counts_with_one_row() -> None:
    alone = pipelines(Linear(fixed_s=0.1), Linear(fixed_s=0.1))
    assert bounds.ttft_s(alone, 1_000) == pytest.approx((0.1 + 10.0) + (0.1 + 0.01))


def test_a_prompt_that_is_too_long_for_the_objective_is_lost_to_anybody() -> None:
    requests = [Request(0.0, (50,), 1.0), Request(10.0, (50,), 1.0), Request(20.0, (200,), 1.0)]
    one = pipelines(Linear())
    assert bounds.slo_alone(one, requests) == 2 / 3
    assert bounds.slo_clairvoyant(one, requests) == 2 / 3


def test_who_arrives_at_once_shares_the_devices() -> None:
    """Ten seconds of work at once, and 3 s for it: three on one node, six on two; batches cannot be cheaper
    here.
    """
    requests = [Request(0.0, (100,), 3.0) for _ in range(10)]
    assert bounds.slo_clairvoyant(pipelines(Linear()), requests) == 0.3
    assert bounds.slo_clairvoyant(pipelines(Linear(), nodes=2), requests) == 0.6


def test_what_is_fixed_costs_a_large_batch_nothing() -> None:
    assert bounds.inference_share_s(Linear(fixed_s=1.0), 100) == pytest.approx(1.0 + 1 / 1_000)


def test_node_seconds_are_at_least_the_work_of_the_most_loaded_stage() -> None:
    two = pipelines(Linear(), Linear(token_s=0.02))
    per_node_s = bounds.tasks_per_node_s(two, [Request(0.0, (100,), 1.0)], [[50]])
    assert per_node_s == pytest.approx(2 / (2.0 + (1.0 + 2.0 + 1.0)))


def test_who_serves_in_time_is_in_use_while_requests_arrive() -> None:
    requests = [Request(10.0 * number, (1,), 1.0) for number in range(11)]
    one = bounds.tasks_per_node_s_in_time(pipelines(Linear()), requests, [])
    assert one == pytest.approx(11 / (100.0 - 1.0))
    two = bounds.tasks_per_node_s_in_time(pipelines(Linear(), nodes=2), requests, [])
    assert two == pytest.approx(11 / (100.0 - 1.0 - (10.0 + 1.0)))


def test_training_is_bounded_by_the_work_and_by_what_a_release_waits_for() -> None:
    batches = [[100], [100, 100]]
    many, few = pipelines(Linear(), nodes=100), pipelines(Linear(), nodes=2)
    work_s = 3.0 * 3 + 2 * 1.0

    def bound(on: Pipelines, gate_s: float) -> float:
        return bounds.training_tokens_per_s(on, batches, lambda lengths: gate_s * len(lengths))

    assert bound(many, 1.0) == pytest.approx(300 / 3.0)
    assert bound(many, 0.0) == pytest.approx(300 / (work_s / 100))
    assert bound(few, 1.0) == pytest.approx(300 / (work_s / 2))


def test_a_release_waits_for_stage_0_or_for_the_last_step() -> None:
    two = pipelines(Linear(), Linear(token_s=0.02))
    assert bounds.passing_s(two, [50, 50]) == pytest.approx(1.0)
    assert bounds.applying_s(two, [50, 50]) == pytest.approx((1.0 + 2.0) + (2.0 + 4.0) + 1.0)


def test_a_token_goes_once_round() -> None:
    assert bounds.tbt_s(pipelines(Linear(), Linear(fixed_s=1.0), hop_s=0.5)) == pytest.approx(
        0.02 + 1.0 + 2 * 0.5
    )


def test_the_fewest_nodes_are_those_that_have_room_for_the_cheapest_share() -> None:
    """Nine requests of 1 s and one of 90 s; nine batches of 4 s for 100 tokens and one of 7 s for 200."""
    requests = [Request(0.0, (100,), 9.0)] * 9 + [Request(0.0, (9_000,), 9.0)]
    batches = [(100,)] * 9 + [(200,)]

    def needed(in_time: float, kept: float, window_s: float = 10.0) -> int:
        of = pipelines(Linear())
        return bounds.fewest_nodes(of, requests, batches, in_time=in_time, kept=kept, window_s=window_s)

    assert needed(0.9, 0.0) == 1, "9 s"
    assert needed(1.0, 0.0) == 10, "99 s"
    assert needed(0.9, 200 / 1_100) == 2, "9 and 7 s"
    assert needed(0.9, 1.0) == 6, "9, 7 and 36 s"
    assert needed(0.9, 1.0, window_s=26.0) == 2
