"""Bounds that no policy can exceed on given devices and a given workload. Pure.

Every bound is of a problem that is easier than the real one: what makes it easier is said with it. So a
bound may be out of reach, but what is above it is impossible.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil

from shared.profiles.times import NO_WORK, StageTimes, Work, work_of_rows

LARGE_BATCH = 1_000
"""With so many equal prompts in one iteration, each has the share that it costs at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipelines:
    """The pipelines that the tasks run on."""

    nodes: int
    times: Sequence[StageTimes]
    """By stage."""
    hop_s: float
    """Seconds from one stage to the next."""
    max_iteration_tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """One or more prompts that come together; it is answered when all have their first token."""

    at_s: float
    lengths: tuple[int, ...]
    """Tokens of each prompt."""
    objective_s: float
    """The longest time to its first token that it allows."""


def ttft_s(pipelines: Pipelines, num_tokens: int) -> float:
    """Least time to first token for a prompt that has a node to itself from its arrival on.

    The ways from and to the gateway are left out.

    A prompt of several iterations: stage 0 takes at least as long as for all rows at once; behind it only
    the last iteration is counted, with one row.
    """
    first, *others = pipelines.times
    whole = work_of_rows(0, num_tokens)
    last = whole if num_tokens <= pipelines.max_iteration_tokens else work_of_rows(num_tokens - 1, 1)
    way_s = len(others) * pipelines.hop_s
    return first.iteration_s(whole) + way_s + sum(times.iteration_s(last) for times in others)


def response_s(pipelines: Pipelines, request: Request) -> float:
    """Least response time of a request: that of its longest prompt; the others may be elsewhere."""
    return ttft_s(pipelines, max(request.lengths))


def slo_alone(pipelines: Pipelines, requests: Sequence[Request]) -> float:
    """Share of the requests that can meet their objective at all: the others miss it on an empty node."""
    return sum(response_s(pipelines, request) <= request.objective_s for request in requests) / len(requests)


def slo_clairvoyant(pipelines: Pipelines, requests: Sequence[Request]) -> float:
    """Share of the requests that a clairvoyant scheduler could serve in time if there were no training.

    Easier than the truth: all nodes together are one that is N times as fast; of each request only its
    share of an endless batch at the most loaded stage is counted; the other stages only narrow its window,
    by as much as they do for the shortest prompt; and none is due before one that came earlier. What is left
    is to choose the most jobs with releases and dues in the same order on one machine, which the rule of
    Kise, Ibaraki and Mine (1978) solves exactly: take jobs in order of their dues, and whenever one is late,
    drop the job without which the rest is over first.
    """
    able = [request for request in requests if response_s(pipelines, request) <= request.objective_s]
    if not able:
        return 0.0
    stage = max(range(len(pipelines.times)), key=lambda stage: sum(_shares(pipelines, able, stage)))
    shortest = work_of_rows(0, min(min(request.lengths) for request in able))
    head_s = sum(times.iteration_s(shortest) for times in pipelines.times[:stage])
    tail_s = sum(times.iteration_s(shortest) for times in pipelines.times[stage + 1 :])
    able.sort(key=lambda request: request.at_s)
    dues_s = accumulate((request.at_s + request.objective_s for request in able), max)
    jobs = [
        Job(request.at_s + head_s, share_s / pipelines.nodes, due_s - tail_s)
        for request, share_s, due_s in zip(able, _shares(pipelines, able, stage), dues_s, strict=True)
    ]
    return num_on_time(sorted(jobs, key=lambda job: job.due_s)) / len(requests)


def _shares(pipelines: Pipelines, requests: Sequence[Request], stage: int) -> list[float]:
    return [request_s(pipelines.times[stage], request) for request in requests]


def request_s(times: StageTimes, request: Request) -> float:
    """Least time that a request takes on a stage."""
    return sum(inference_share_s(times, num_tokens) for num_tokens in request.lengths)


def inference_share_s(times: StageTimes, num_tokens: int) -> float:
    """Least time that a prompt takes on a stage: its share of an iteration with very many like it."""
    return times.iteration_s(work_of_rows(0, num_tokens) * LARGE_BATCH) / LARGE_BATCH


@dataclass(frozen=True, slots=True)
class Job:
    release_s: float
    length_s: float
    due_s: float


def num_on_time(jobs: Sequence[Job]) -> int:
    """The most jobs that one machine can end by their dues; releases and dues must have the same order.

    Quadratic in the number of jobs, where many are late.
    """
    kept: list[Job] = []
    end_s = float("-inf")
    for job in jobs:
        kept.append(job)
        end_s = max(end_s, job.release_s) + job.length_s
        if end_s > job.due_s:
            del kept[_costliest(kept)]
            end_s = _ends(kept)[-1] if kept else float("-inf")
    return len(kept)


def _costliest(jobs: Sequence[Job]) -> int:
    """The job without which the others are over first.

    Without job j, each later one moves forward by as much as the one before it, but not before its release.
    """
    ends = _ends(jobs)
    best, best_gain_s, room_s = (
        len(jobs) - 1,
        ends[-1] - (ends[-2] if len(jobs) > 1 else float("-inf")),
        float("inf"),
    )
    for index in range(len(jobs) - 2, -1, -1):
        follower_start_s = ends[index + 1] - jobs[index + 1].length_s
        room_s = min(room_s, follower_start_s - jobs[index + 1].release_s)
        before_s = ends[index - 1] if index else float("-inf")
        gain_s = min(room_s, follower_start_s - before_s)
        if gain_s > best_gain_s:
            best, best_gain_s = index, gain_s
    return best


def _ends(jobs: Sequence[Job]) -> list[float]:
    ends: list[float] = []
    end_s = float("-inf")
    for job in jobs:
        end_s = max(end_s, job.release_s) + job.length_s
        ends.append(end_s)
    return ends


def training_s(times: StageTimes, lengths: Sequence[int]) -> float:
    """Time that a batch of one microbatch takes on a stage: forward, backward and step."""
    work = _work_of(lengths)
    return times.forward_s(work) + times.backward_s(work) + times.step_s()


def work_s(pipelines: Pipelines, requests: Sequence[Request], batches: Sequence[Sequence[int]]) -> float:
    """Device seconds that all tasks need at least, on the stage that needs most."""
    return max(
        sum(request_s(times, request) for request in requests)
        + sum(training_s(times, lengths) for lengths in batches)
        for times in pipelines.times
    )


def tasks_per_node_s(
    pipelines: Pipelines, requests: Sequence[Request], batches: Sequence[Sequence[int]]
) -> float:
    """Each stage of a node works at most as long as its node is in use, so node-seconds are at least the
    work.
    """
    return (len(requests) + len(batches)) / work_s(pipelines, requests, batches)


def tasks_per_node_s_in_time(
    pipelines: Pipelines, requests: Sequence[Request], batches: Sequence[Sequence[int]]
) -> float:
    """The same for runs that serve every request in time: then nodes are in use while requests arrive.

    A node counts from its first op to its last. N nodes that take over from each other leave at most N - 1
    gaps, and each begins at the earliest with an arrival and ends at the latest when the next one is due.
    """
    slo_s = max(request.objective_s for request in requests)
    arrivals_s = sorted(request.at_s for request in requests)
    gaps_s = sorted((later - earlier + slo_s for earlier, later in pairwise(arrivals_s)), reverse=True)
    window_s = arrivals_s[-1] - arrivals_s[0] - slo_s - sum(gaps_s[: pipelines.nodes - 1])
    return (len(requests) + len(batches)) / max(window_s, work_s(pipelines, requests, batches))


def training_tokens_per_s(
    pipelines: Pipelines, batches: Sequence[Sequence[int]], gate_s: Callable[[Sequence[int]], float]
) -> float:
    """Without any request. The nodes together must do all the work; and `gate_s` of a batch must be over
    before the next one is released (0: nothing is waited for), wherever it runs.
    """
    all_s = max(sum(training_s(times, lengths) for lengths in batches) for times in pipelines.times)
    return sum(map(sum, batches)) / max(all_s / pipelines.nodes, sum(map(gate_s, batches)))


def passing_s(pipelines: Pipelines, lengths: Sequence[int]) -> float:
    """Until a batch of one microbatch has passed stage 0: the closed release of A-PP."""
    return pipelines.times[0].forward_s(_work_of(lengths))


def applying_s(pipelines: Pipelines, lengths: Sequence[int]) -> float:
    """Until a batch of one microbatch is applied: the closed release of S-PP. Stage 0 is the last to step."""
    work = _work_of(lengths)
    both_ways_s = sum(times.forward_s(work) + times.backward_s(work) for times in pipelines.times)
    return both_ways_s + pipelines.times[0].step_s()


def tbt_s(pipelines: Pipelines) -> float:
    """Each token needs one row on every stage, and a message to each."""
    row = work_of_rows(1, 1)
    return sum(times.iteration_s(row) + pipelines.hop_s for times in pipelines.times)


def _work_of(lengths: Sequence[int]) -> Work:
    return sum((work_of_rows(0, length) for length in lengths), NO_WORK)


def fewest_nodes(
    pipelines: Pipelines,
    requests: Sequence[Request],
    batches: Sequence[Sequence[int]],
    *,
    in_time: float,
    kept: float,
    window_s: float,
) -> int:
    """Nodes needed at least to serve the share `in_time` of the requests and to apply the share `kept` of the
    training tokens within `window_s` seconds.

    Of both the cheapest are chosen, and stages are never idle. What is decoded after the first token is left
    out.
    """
    needed_s = max(
        _cheapest_s([(request_s(times, request), 1.0) for request in requests], in_time)
        + _cheapest_s([(training_s(times, lengths), sum(lengths)) for lengths in batches], kept)
        for times in pipelines.times
    )
    return max(1, ceil(needed_s / window_s))


def _cheapest_s(jobs: Sequence[tuple[float, float]], share: float) -> float:
    """Least seconds for that share of the value of jobs of (seconds, value), parts of jobs allowed."""
    left, total_s = share * sum(value for _, value in jobs), 0.0
    for seconds, value in sorted(jobs, key=lambda job: job[0] / job[1]):
        part = min(1.0, left / value)
        total_s, left = total_s + part * seconds, left - part * value
        if left <= 0:
            break
    return total_s
