import asyncio
import itertools
import random
import statistics
from typing import Any

import pytest

from lemix.client import ApiError, Completion
from lemix.load import Outcome, PlannedRequest, plan_requests, poisson_arrivals_s, run_requests
from lemix.simulation.loop import VirtualClock, run_virtual
from shared.clock import SystemClock

DONE = Completion(
    text="x",
    finish_reason="length",
    prompt_tokens=1,
    completion_tokens=1,
    ttft_s=0.1,
    tbt_s=(),
    weights_versions=(0, 0),
)


def test_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    times = poisson_arrivals_s(5.0, 10_000.0, random.Random(1))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times == sorted(times)
    assert times[0] >= 0 and times[-1] < 10_000
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.02)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.02)
    counts = [sum(1 for time in times if second <= time < second + 1) for second in range(200)]
    assert statistics.variance(counts) == pytest.approx(5.0, rel=0.3)


def test_the_same_seed_plans_the_same_load() -> None:
    def plan(seed: int) -> list[PlannedRequest]:
        return plan_requests(
            ["a", "b", "c"],
            rate_per_s=2,
            duration_s=30,
            max_tokens=(16, 48),
            chat_share=0.5,
            rng=random.Random(seed),
        )

    assert plan(3) == plan(3)
    assert plan(3) != plan(4)
    assert {request.prompt for request in plan(3)} == {"a", "b", "c"}
    assert all(16 <= request.max_tokens <= 48 for request in plan(3))
    assert {request.is_chat for request in plan(3)} == {False, True}


def test_the_share_of_chat_is_that_of_the_plan() -> None:
    plan = plan_requests(
        ["a"], rate_per_s=10, duration_s=1000, max_tokens=(1, 1), chat_share=0.2, rng=random.Random(0)
    )
    assert statistics.mean(request.is_chat for request in plan) == pytest.approx(0.2, abs=0.02)


class FakeApi:
    """Answers at once; the prompt `bad` is refused, the prompt `wait` is held until `gate` opens."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.gate = asyncio.Event()

    async def chat(self, message: str, *, max_tokens: int, **_: Any) -> Completion:
        self.prompts.append(f"chat: {message}")
        return DONE

    async def complete(self, prompt: str, *, max_tokens: int, **_: Any) -> Completion:
        self.prompts.append(prompt)
        if prompt == "bad":
            raise ApiError("refused")
        if prompt == "wait":
            await self.gate.wait()
        elif prompt == "last":
            self.gate.set()
        return DONE


def test_requests_go_out_at_their_times_whatever_became_of_the_earlier_ones() -> None:
    api = FakeApi()
    plan = [
        PlannedRequest(at_s=float(index), prompt=p, max_tokens=1)
        for index, p in enumerate(("wait", "bad", "last"))
    ]
    seen: list[str] = []

    async def case() -> list[Outcome]:
        clock = VirtualClock(asyncio.get_running_loop())
        return await run_requests(
            api, plan, clock=clock, on_outcome=lambda outcome: seen.append(outcome.error)
        )

    outcomes = run_virtual(case())
    assert api.prompts == ["wait", "bad", "last"]
    assert [outcome.error for outcome in outcomes] == ["", "refused", ""]
    assert [outcome.completion for outcome in outcomes] == [DONE, None, DONE]
    assert [outcome.request for outcome in outcomes] == plan
    assert sorted(seen) == ["", "", "refused"]


async def test_a_planned_chat_asks_by_chat() -> None:
    api = FakeApi()
    plan = [PlannedRequest(at_s=0.0, prompt="hi", max_tokens=1, is_chat=True)]
    await run_requests(api, plan, clock=SystemClock(), on_outcome=lambda outcome: None)
    assert api.prompts == ["chat: hi"]
