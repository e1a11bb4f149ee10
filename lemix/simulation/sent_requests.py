"""The requests of a workload, sent at their times through a gateway of their own."""

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from lemix.simulation.record import RequestRecord
from lemix.simulation.workload import PlannedRequest
from services.gateway.cluster_client import ClusterClient, Session
from services.gateway.sent_sequence import SequenceSpec
from shared.clock import Clock
from shared.errors import LemixError
from shared.messages.inference import Sampling

TOKEN = 1
"""The token that prompts and examples consist of: only their lengths matter."""
NUM_BEGINNINGS = 97
"""Prompts begin with three tokens below it, no two alike: none finds another in the KV cache."""


@dataclass(slots=True)
class _Answer:
    """All that has come of one sequence."""

    times_s: list[float] = field(default_factory=list)
    """When its tokens came, after the beginning."""
    version: int | None = None
    logprobs: list[float] = field(default_factory=list)
    """One for each of the prompt's tokens but the first."""


async def send_requests(
    gateway: ClusterClient, requests: Sequence[PlannedRequest], *, clock: Clock, began_s: float
) -> tuple[RequestRecord, ...]:
    """Send each at its time, whatever became of the earlier ones; returns when all have ended."""
    ended: dict[int, RequestRecord] = {}
    numbers = itertools.count()

    async def send(place: int, request: PlannedRequest) -> None:
        ended[place] = await _send(gateway, request, _specs(request, numbers), clock, began_s)

    async with asyncio.TaskGroup() as group:
        for place, request in enumerate(requests):
            await asyncio.sleep(began_s + request.at_s - clock.now_s())
            group.create_task(send(place, request))
    return tuple(ended[place] for place in range(len(requests)))


async def _send(
    gateway: ClusterClient,
    request: PlannedRequest,
    specs: Sequence[SequenceSpec],
    clock: Clock,
    began_s: float,
) -> RequestRecord:
    arrived_s = clock.now_s() - began_s
    session = gateway.submit(specs)
    answers = [_Answer() for _ in request.lengths]
    error = ""
    try:
        await _collect(session, answers, began_s)
    except LemixError as failure:
        error = str(failure) or type(failure).__name__
    finally:
        session.close()
    return RequestRecord(
        arrived_s=arrived_s,
        lengths=request.lengths,
        ended_s=clock.now_s() - began_s,
        nodes=tuple(None if each is None else each.node for each in session.placements),
        token_times_s=tuple(tuple(answer.times_s) for answer in answers),
        versions=tuple(answer.version for answer in answers),
        losses=tuple(map(_loss, answers, request.lengths)),
        error=error,
    )


def _specs(request: PlannedRequest, numbers: Iterator[int]) -> list[SequenceSpec]:
    is_scored = bool(request.prompts)
    prompts = request.prompts or [prompt_of(next(numbers), length) for length in request.lengths]
    sampling = Sampling(max_tokens=request.max_tokens, temperature=0, num_logprobs=0 if is_scored else None)
    return [SequenceSpec(prompt=prompt, sampling=sampling, prompt_logprobs=is_scored) for prompt in prompts]


def prompt_of(number: int, length: int) -> tuple[int, ...]:
    """The prompt of a run's sequence of that number."""
    beginning = [number // NUM_BEGINNINGS**place % NUM_BEGINNINGS for place in range(3)]
    return (*beginning, *(TOKEN,) * (length - 3))[:length]


async def _collect(session: Session, answers: Sequence[_Answer], began_s: float) -> None:
    """Note what comes, and when, until every sequence is finished. Raises what ends the session."""
    num_running = len(answers)
    while num_running:
        for arrival in await session.next():
            answer, result = answers[arrival.place], arrival.result
            answer.version = arrival.weights_version
            answer.logprobs += [told.logprob for told in result.prompt if told.logprob is not None]
            if result.token is not None:
                answer.times_s.append(arrival.at_s - began_s)
            num_running -= result.finish is not None


def _loss(answer: _Answer, length: int) -> float | None:
    is_scored = length > 1 and len(answer.logprobs) == length - 1
    return -fmean(answer.logprobs) if is_scored else None
