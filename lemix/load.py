"""Load on the API: which requests arrive when (pure, drawn from a given generator), and running them."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lemix.client import ApiClient, ApiError, Completion
from shared.clock import Clock


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of a load."""

    at_s: float
    """Seconds after the load begins."""
    prompt: str
    max_tokens: int
    is_chat: bool = False
    """Ask by chat, with the prompt as the user's message."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one request: a completion, or the reason why there is none."""

    request: PlannedRequest
    completion: Completion | None
    error: str
    """Empty for a completion."""
    ended_s: float
    """By the clock of the load."""


def poisson_arrivals_s(rate_per_s: float, duration_s: float, rng: random.Random) -> list[float]:
    """Arrival times in [0, duration_s): independent exponential gaps of mean 1 / rate_per_s."""
    times: list[float] = []
    now_s = rng.expovariate(rate_per_s)
    while now_s < duration_s:
        times.append(now_s)
        now_s += rng.expovariate(rate_per_s)
    return times


def plan_requests(
    prompts: Sequence[str],
    *,
    rate_per_s: float,
    duration_s: float,
    max_tokens: tuple[int, int],
    chat_share: float,
    rng: random.Random,
) -> list[PlannedRequest]:
    """Poisson arrivals of random prompts, each asking for a number of tokens within `max_tokens`.

    A random share of them, `chat_share` on average, asks by chat.
    """
    return [
        PlannedRequest(
            at_s=at_s,
            prompt=rng.choice(prompts),
            max_tokens=rng.randint(*max_tokens),
            is_chat=rng.random() < chat_share,
        )
        for at_s in poisson_arrivals_s(rate_per_s, duration_s, rng)
    ]


async def run_requests(
    api: ApiClient, plan: Sequence[PlannedRequest], *, clock: Clock, on_outcome: Callable[[Outcome], None]
) -> list[Outcome]:
    """Send each request at its time, whatever became of the earlier ones; wait for all to end."""
    began_s = clock.now_s()

    async def run(request: PlannedRequest) -> Outcome:
        await asyncio.sleep(began_s + request.at_s - clock.now_s())
        completion, error = await _complete(api, request)
        outcome = Outcome(request, completion, error, clock.now_s())
        on_outcome(outcome)
        return outcome

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(request)) for request in plan]
    return [task.result() for task in tasks]


async def _complete(api: ApiClient, request: PlannedRequest) -> tuple[Completion | None, str]:
    ask = api.chat if request.is_chat else api.complete
    try:
        return await ask(request.prompt, max_tokens=request.max_tokens), ""
    except ApiError as error:
        return None, str(error)
