"""The requests of a workload, sent at their times through a gateway of their own."""

import asyncio
import itertools
from collections.abc import Iterator, Sequence

from lemix.simulation.record import RequestRecord
from lemix.simulation.workload import PlannedRequest
from services.gateway.cluster_client import ClusterClient, SequenceSpec, Session
from shared.clock import Clock
from shared.errors import LemixError
from shared.messages.inference import Sampling

TOKEN = 1
"""The token that prompts and examples consist of: only their lengths matter."""
NUM_BEGINNINGS = 97
"""Prompts begin with three tokens below it, no two alike: none finds another in the KV cache."""


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
    times_s: list[list[float]] = [[] for _ in request.lengths]
    error = ""
    try:
        await _collect(session, times_s, began_s)
    except LemixError as failure:
        error = str(failure) or type(failure).__name__
    finally:
        session.close()
    return RequestRecord(
        arrived_s=arrived_s,
        lengths=request.lengths,
        ended_s=clock.now_s() - began_s,
        nodes=session.nodes,
        token_times_s=tuple(map(tuple, times_s)),
        error=error,
    )


def _specs(request: PlannedRequest, numbers: Iterator[int]) -> list[SequenceSpec]:
    sampling = Sampling(max_tokens=request.max_tokens, temperature=0)
    return [
        SequenceSpec(prompt=prompt_of(next(numbers), length), sampling=sampling) for length in request.lengths
    ]


def prompt_of(number: int, length: int) -> tuple[int, ...]:
    """The prompt of a run's sequence of that number."""
    beginning = [number // NUM_BEGINNINGS**place % NUM_BEGINNINGS for place in range(3)]
    return (*beginning, *(TOKEN,) * (length - 3))[:length]


async def _collect(session: Session, times_s: list[list[float]], began_s: float) -> None:
    """Note when each token comes, until every sequence is finished. Raises what ends the session."""
    num_running = len(times_s)
    while num_running:
        for arrival in await session.next():
            if arrival.result.token is not None:
                times_s[arrival.place].append(arrival.at_s - began_s)
            num_running -= arrival.result.finish is not None
