"""The official client says how soon it needs an answer, and is told the tier that served it."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from services.gateway.access.keys import ServiceClass
from shared.messages.inference import RUN_OBJECTIVE, Objective
from tests.clients.ways import async_client_of
from tests.support.gateway import MODEL, World, gateway_world, says, served
from tests.unit.gateway.http.test_auth import make_key

Ask = Callable[..., Awaitable[Any]]
SOON = {"lemix": {"slo": {"ttft_s": 0.5, "tbt_s": 0.05, "when_late": "refuse"}, "priority": 3}}
BATCH = Objective(when_late="serve_last", priority=100)


def asks_of(client: openai.AsyncOpenAI) -> list[Ask]:
    """Every way to ask for text."""
    return [
        lambda **more: client.completions.create(model=MODEL, prompt="Hello", **more),
        lambda **more: client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}], **more
        ),
        lambda **more: client.responses.create(model=MODEL, input="Hello", **more),
    ]


def objectives_in(world: World) -> list[Objective]:
    """Those of the sequences that have come to the scheduler since the last look."""
    submitted = world.cluster.submitted
    return [submitted.get_nowait().objective for _ in range(submitted.qsize())]


async def test_the_times_that_a_request_asks_for_come_to_the_scheduler() -> None:
    async with (
        gateway_world(says("Hello.")) as world,
        served(world) as address,
        async_client_of(address) as client,
    ):
        for ask in asks_of(client):
            await ask(extra_body=SOON)
        expected = Objective(ttft_s=0.5, tbt_s=0.05, when_late="refuse", priority=3)
        assert objectives_in(world) == [expected] * 3
        await asks_of(client)[0](extra_body=SOON, n=3)
        assert objectives_in(world) == [expected] * 3
        with pytest.raises(openai.BadRequestError) as refused:
            await asks_of(client)[1](extra_body={"lemix": {"slo": {"ttft": 1}}})
    assert refused.value.param == "lemix.slo.ttft"


@pytest.mark.parametrize(
    ("of_key", "asked", "expected", "tier"),
    [
        ("interactive", {}, RUN_OBJECTIVE, "default"),
        ("interactive", {"service_tier": "default"}, RUN_OBJECTIVE, "default"),
        ("interactive", {"service_tier": "flex"}, BATCH, "flex"),
        ("batch", {"service_tier": "auto"}, BATCH, "flex"),
        ("batch", {"service_tier": "default"}, BATCH, "flex"),
    ],
)
async def test_a_key_and_a_tier_make_the_class(
    tmp_path: Path, of_key: ServiceClass, asked: dict[str, Any], expected: Objective, tier: str
) -> None:
    token = make_key(tmp_path, "infer", service_class=of_key)
    async with (
        gateway_world(says("Hello."), run_dir=tmp_path) as world,
        served(world) as address,
        async_client_of(address, api_key=token) as client,
    ):
        answers = [await ask(extra_body=asked) for ask in asks_of(client)]
        streamed = [chunk async for chunk in await asks_of(client)[1](extra_body=asked, stream=True)]
        assert objectives_in(world) == [expected] * 4
    assert [answer.service_tier for answer in answers] == [tier] * 3
    assert {chunk.service_tier for chunk in streamed} == {tier}
