import itertools
import random
import statistics
from collections import Counter

import pytest

from lemix.simulation.trace import TraceRow
from lemix.simulation.workload import (
    ALTERNATING_RATES_PER_S,
    PROMPT,
    Order,
    Workload,
    WorkloadOptions,
    plan,
)
from shared.errors import ConfigurationError

TRACE: dict[str, object] = {"trace": (TraceRow(0.0, 1, 1),), "num_tasks": 1, "rate_per_s": None}


def planned(seed: int = 1, **options: object) -> Workload:
    given: dict[str, object] = {"num_tasks": 2_000, "rate_per_s": 10.0} | options
    return plan(WorkloadOptions(**given), random.Random(seed))  # type: ignore[arg-type]


def arrivals_s(workload: Workload) -> list[float]:
    return [request.at_s for request in workload.requests]


def lengths_in_time(order: Order) -> list[int]:
    """Of all tasks, where all are requests."""
    workload = planned(order=order, training_rate=0.0)
    return [request.lengths[0] for request in workload.requests]


def test_prompts_have_the_mean_and_the_spread_of_the_data() -> None:
    rng = random.Random(3)
    lengths = [PROMPT.draw(rng) for _ in range(100_000)]
    assert statistics.mean(lengths) == pytest.approx(94.8, rel=0.02)
    assert statistics.stdev(lengths) == pytest.approx(103.1, rel=0.05)
    assert statistics.median(lengths) == pytest.approx(61, rel=0.1)  # the data's own: the fit was not told


def test_tasks_split_as_the_paper_splits_them() -> None:
    # floor(n (1 - alpha)) tasks are inference: 0.9 is not a sum of powers of two
    for training_rate, num_requests in [(0.0, 334), (0.1, 300), (0.5, 167), (0.9, 33), (1.0, 0)]:
        workload = planned(num_tasks=334, training_rate=training_rate)
        assert (len(workload.requests), len(workload.batches)) == (num_requests, 334 - num_requests)
    assert len(planned(num_tasks=10, training_rate=0.9).requests) == 1


def test_the_same_seed_plans_the_same_workload() -> None:
    assert planned(seed=1) == planned(seed=1)
    assert planned(seed=1) != planned(seed=2)


def test_workloads_that_differ_in_rate_hold_the_same_tasks() -> None:
    slow, fast = planned(rate_per_s=4.0), planned(rate_per_s=32.0)
    assert [request.lengths for request in slow.requests] == [request.lengths for request in fast.requests]
    assert slow.batches == fast.batches


def test_requests_arrive_as_a_poisson_process() -> None:
    times_s = arrivals_s(planned(num_tasks=20_000, training_rate=0.0, rate_per_s=5.0))
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(times_s)]
    assert min(gaps_s) > 0
    assert statistics.mean(gaps_s) == pytest.approx(0.2, rel=0.03)
    assert statistics.stdev(gaps_s) == pytest.approx(0.2, rel=0.03)


def test_alternating_arrivals_take_each_rate_for_the_same_time() -> None:
    workload = planned(arrivals="alternating", rate_per_s=None, training_rate=0.0, num_tasks=19_400)
    times_s = arrivals_s(workload)
    # 194 = the sum of the rates, so that each segment lasts 100 s in the mean
    upto = list(itertools.accumulate(100 * rate for rate in ALTERNATING_RATES_PER_S))
    ends_s = [times_s[count - 1] for count in upto]
    lasting_s = [later - earlier for earlier, later in itertools.pairwise([0.0, *ends_s])]
    assert upto[-1] == len(times_s)
    assert lasting_s == [pytest.approx(100, rel=0.12)] * len(ALTERNATING_RATES_PER_S)


def test_all_requests_can_come_at_once() -> None:
    workload = planned(arrivals="all", rate_per_s=None)
    assert set(arrivals_s(workload)) == {0.0}


def test_tasks_come_in_order_of_length() -> None:
    ascending, descending = lengths_in_time("ascending"), lengths_in_time("descending")
    assert ascending == sorted(ascending)
    assert descending == ascending[::-1]
    assert sorted(lengths_in_time("random")) == ascending != lengths_in_time("random")


def test_bursty_tasks_alternate_between_the_shorter_and_the_longer_half() -> None:
    lengths = lengths_in_time("bursty")
    assert max(lengths[::2]) <= min(lengths[1::2])
    assert Counter(lengths) == Counter(lengths_in_time("random"))


def test_sigma_decides_how_far_lengths_spread() -> None:
    for sigma in (10.0, 25.0):
        lengths = [
            length for batch in planned(num_tasks=500, sigma=sigma).batches for length in batch.lengths
        ]
        assert statistics.mean(lengths) == pytest.approx(150, rel=0.1)
        assert statistics.stdev(lengths) == pytest.approx(sigma, rel=0.25)


def test_a_dialogue_is_used_once() -> None:
    """With sigma 0 all want the mean: they get the lengths around it, one after the other."""
    lengths = [batch.lengths[0] for batch in planned(num_tasks=2_000, training_rate=1.0, sigma=0.0).batches]
    assert max(Counter(lengths).values()) < 100
    assert abs(lengths[0] - statistics.mean(lengths)) < 10
    assert max(lengths) - min(lengths) > 50


def test_batches_and_requests_have_their_sizes() -> None:
    workload = planned(batch_size=3, request_size=2)
    assert {len(batch.lengths) for batch in workload.batches} == {3}
    assert {len(request.lengths) for request in workload.requests} == {2}


def test_generating_requests_have_the_prompt_alone() -> None:
    forced, generating = planned(), planned(max_tokens=(16, 64))
    assert {request.max_tokens for request in forced.requests} == {1}
    assert {request.max_tokens for request in generating.requests} == set(range(16, 65))
    lengths = [[r.lengths[0] for r in workload.requests] for workload in (forced, generating)]
    assert statistics.mean(lengths[0]) == pytest.approx(94.8 + 55, rel=0.1)
    assert statistics.mean(lengths[1]) == pytest.approx(94.8, rel=0.1)


def test_no_sequence_is_longer_than_allowed() -> None:
    workload = planned(max_length=100, max_tokens=(1, 60))
    assert max(batch.lengths[0] for batch in workload.batches) == 100
    assert max(request.lengths[0] + request.max_tokens for request in workload.requests) == 100
    assert min(request.lengths[0] for request in workload.requests) >= 1


def test_batches_are_released_at_once_or_as_a_poisson_process() -> None:
    assert {batch.at_s for batch in planned(release="all").batches} == {0.0}
    times_s = [batch.at_s for batch in planned(release="poisson", training_per_s=2.0).batches]
    assert times_s == sorted(times_s)
    assert times_s[-1] / len(times_s) == pytest.approx(0.5, rel=0.1)


def test_a_trace_is_replayed() -> None:
    trace = tuple(TraceRow(float(i), 100 + i, 10 * i + 1) for i in range(30))
    as_it_is = planned(trace=trace, num_tasks=40, rate_per_s=None)
    assert [(r.at_s, r.lengths, r.max_tokens) for r in as_it_is.requests] == [
        (float(i), (100 + i,), 10 * i + 1) for i in range(20)
    ]
    faster = planned(trace=trace, num_tasks=40, rate_per_s=19.0)
    assert arrivals_s(faster)[-1] == pytest.approx(1.0)
    short = planned(trace=trace, num_tasks=40, rate_per_s=None, max_length=110)
    assert max(r.lengths[0] + r.max_tokens for r in short.requests) == 110


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"training_rate": 1.5}, "training_rate must be in 0..1, not 1.5"),
        ({"num_tasks": 0}, "num_tasks"),
        ({"rate_per_s": None}, "rate_per_s must be given"),
        ({"rate_per_s": 0.0}, "rate_per_s must be above 0"),
        ({"order": "sorted"}, "order must be one of random, ascending, descending, bursty, not 'sorted'"),
        ({"arrivals": "often"}, "arrivals must be one of"),
        ({"release": "later"}, "release must be one of"),
        ({"release": "poisson"}, "training_per_s must be given"),
        ({"max_tokens": (4, 2)}, "max_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"sigma": -1.0}, "sigma"),
        ({"trace": (TraceRow(0.0, 1, 1),)}, "in the trace of 1"),
        (TRACE | {"arrivals": "all"}, "arrivals='all' would do nothing: a trace"),
        (TRACE | {"order": "bursty"}, "order='bursty' would do nothing"),
        (TRACE | {"sigma": 10.0}, "sigma=10.0 would do nothing"),
        (TRACE | {"request_size": 2}, "request_size=2 would do nothing"),
        (TRACE | {"max_tokens": (1, 8)}, "max_tokens=(1, 8) would do nothing"),
        ({"arrivals": "all"}, "rate_per_s=10.0 would do nothing: arrivals all"),
        ({"arrivals": "alternating"}, "rate_per_s=10.0 would do nothing: arrivals alternating"),
        ({"training_per_s": 2.0}, "training_per_s=2.0 would do nothing: .*release poisson, not closed"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named.replace("(", r"\(").replace(")", r"\)")):
        planned(**options)
