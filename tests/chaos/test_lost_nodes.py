"""A node dies under load: no request fails, and every token is the one of an undisturbed run.

Real stage workers compute with the embedded model, in virtual time.
"""

import asyncio
from functools import cache
from random import Random

import pytest

from lemix.simulation.cluster import SimulationOptions, devices_of, running_cluster
from lemix.simulation.computing import embedded_model
from lemix.simulation.loop import run_virtual
from lemix.simulation.node_events import NodeEvent
from lemix.studies.learning_texts import bulletins
from services.gateway.cluster_client import Arrival, ClusterClient, Session
from services.gateway.sent_sequence import SequenceSpec
from shared.messages.inference import Sampling
from shared.model_files import read_card, resolve
from shared.settings import EMBEDDED_MODEL
from shared.structured_output import grammar_of

NUM_TOKENS = 24
AT_S = 0.1
"""When most have their first tokens, and none its last."""
SCHEMA = '{"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 9}'
EVENTS: dict[str, tuple[NodeEvent, ...]] = {
    "fails": (NodeEvent(at_s=AT_S, kind="fail", node=1),),
    "leaves": (NodeEvent(at_s=AT_S, kind="leave", node=1),),
    "fails and joins": (
        NodeEvent(at_s=AT_S, kind="fail", node=1),
        NodeEvent(at_s=AT_S + 0.05, kind="join", node=1),
    ),
}


def samplings() -> list[Sampling]:
    """Every way to draw of which a draw depends on the tokens before it, or on their number."""
    ends = read_card(resolve(EMBEDDED_MODEL, ("config.json",)), "m").eos_token_ids
    return [
        Sampling(max_tokens=NUM_TOKENS, temperature=0, num_logprobs=2),
        Sampling(max_tokens=NUM_TOKENS, temperature=1.0, seed=3),
        Sampling(max_tokens=NUM_TOKENS, temperature=0.8, seed=4, frequency_penalty=1.5, presence_penalty=0.5),
        Sampling(max_tokens=NUM_TOKENS, temperature=0, repetition_penalty=1.8),
        Sampling(max_tokens=NUM_TOKENS, temperature=1, seed=5, min_tokens=20, stop_token_ids=(*ends, 11)),
        Sampling(max_tokens=NUM_TOKENS, temperature=1, seed=6, grammar=grammar_of(SCHEMA)),
    ]


def specs() -> list[SequenceSpec]:
    texts = Random(1).sample(bulletins(), 4)
    return [SequenceSpec(prompt=text[:20], sampling=sampling) for text in texts for sampling in samplings()]


async def answer(session: Session) -> list[Arrival]:
    arrivals: list[Arrival] = []
    while not arrivals or arrivals[-1].result.finish is None:
        arrivals += await session.next()
    session.close()
    return arrivals


def answers(events: tuple[NodeEvent, ...]) -> list[list[Arrival]]:
    """What comes for each request, all of which are sent at once."""

    async def main() -> list[list[Arrival]]:
        options = SimulationOptions(
            nodes=2, stages=2, profile="gpt2-large@rtx6000ada", policy="round_robin", events=events
        )
        devices = devices_of(options)
        async with running_cluster(options, devices=devices, compute=embedded_model()) as cluster:
            world = cluster.world
            gateway = ClusterClient(
                bus=world.bus,
                clock=world.clock,
                ids=world.ids,
                telemetry=world.telemetry,
                request_timeout_s=60.0,
            )
            async with gateway.running():
                return await asyncio.gather(*(answer(gateway.submit([spec])) for spec in specs()))

    return run_virtual(main())


@cache
def undisturbed() -> list[list[Arrival]]:
    return answers(())


@pytest.mark.parametrize("name", EVENTS)
def test_every_answer_is_that_of_an_undisturbed_run(name: str) -> None:
    disturbed = answers(EVENTS[name])
    moved = [arrivals for arrivals in disturbed if len({arrival.node for arrival in arrivals}) > 1]
    assert len(moved) >= len(samplings()), "requests that had tokens went on on the other node"
    for before, after in zip(undisturbed(), disturbed, strict=True):
        assert [each.result.token.token for each in after] == [each.result.token.token for each in before]
        assert [each.result.index for each in after] == list(range(len(before)))
        assert after[-1].result.finish == before[-1].result.finish
        assert [each.result.token.logprob for each in after] == pytest.approx(
            [each.result.token.logprob for each in before], abs=1e-4
        )
