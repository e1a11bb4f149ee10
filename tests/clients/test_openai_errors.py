"""The official client raises the class that its users expect for each refusal, and tells what was wrong."""

from pathlib import Path
from typing import Any

import openai
import pytest

from shared.errors import RefusedError
from tests.clients.ways import MODEL, async_client_of
from tests.support import gateway
from tests.support.gateway import gateway_world, says, served
from tests.unit.gateway.http.test_auth import make_key

HELLO: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
HELLO_TINY: Any = HELLO | {"model": gateway.MODEL}


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ],
)
def test_what_is_wrong_is_a_bad_request_that_names_it(
    client: openai.OpenAI, wrong: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**HELLO | wrong)
    assert refused.value.param == param
    assert param in refused.value.message


def test_what_cannot_be_in_time_is_refused_unless_it_can_wait(client: openai.OpenAI) -> None:
    soon: dict[str, Any] = {"ttft_s": 1e-6}
    with pytest.raises(openai.RateLimitError, match="first token would come after") as refused:
        client.chat.completions.create(**HELLO, extra_body={"lemix": {"slo": soon}})
    assert int(refused.value.response.headers["retry-after"]) >= 1
    patient = {"lemix": {"slo": soon | {"when_late": "serve_last"}}}
    answer = client.chat.completions.create(**HELLO, max_tokens=2, extra_body=patient)
    assert answer.usage and answer.usage.completion_tokens


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(**HELLO | {"model": "gpt-4o"})
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_models_are_listed_and_shown(client: openai.OpenAI) -> None:
    [listed] = client.models.list()
    assert listed.id == MODEL
    assert listed.model_extra is not None
    assert listed.model_extra["max_model_len"] == 1024
    assert client.models.retrieve(MODEL) == listed


def test_an_api_that_is_not_there_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="unknown URL"):
        client.embeddings.create(model=MODEL, input="Hello")


async def test_a_client_that_waits_no_longer_raises_a_timeout() -> None:
    async with (
        gateway_world() as world,
        served(world) as address,
        async_client_of(address, timeout=0.2) as client,
    ):
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(**HELLO_TINY)


async def test_a_request_that_took_too_long_here_is_an_internal_error() -> None:
    async with (
        gateway_world(request_timeout_s=0.2) as world,
        served(world) as address,
        async_client_of(address) as client,
    ):
        with pytest.raises(openai.InternalServerError) as refused:
            await client.chat.completions.create(**HELLO_TINY)
    assert refused.value.status_code == 504


async def test_one_request_too_many_is_a_rate_limit() -> None:
    async with (
        gateway_world(max_concurrent_requests=1) as world,
        served(world) as address,
        async_client_of(address) as client,
    ):
        first = await client.chat.completions.create(**HELLO_TINY, stream=True)
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(**HELLO_TINY)
        await first.close()


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_comes_too_early_waits_as_it_is_told(
    monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    waits_s = []

    async def wait(seconds: float) -> None:
        waits_s.append(seconds)

    async with (
        gateway_world(says("Hello.")) as world,
        served(world) as address,
        async_client_of(address, max_retries=1) as client,
    ):
        monkeypatch.setattr("openai._base_client.anyio.sleep", wait)
        world.cluster.refusals = [late(1.25)]
        answer = await client.chat.completions.create(**HELLO_TINY, stream=streamed)
        if isinstance(answer, openai.AsyncStream):
            await answer.close()
        world.cluster.refusals = [late(1.25), late(2.5)]
        with pytest.raises(openai.RateLimitError, match="cannot be in time") as refused:
            await client.chat.completions.create(**HELLO_TINY, stream=streamed)
    assert waits_s == [1.25, 1.25]
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.response.headers["retry-after"] == "3"


def late(retry_after_s: float) -> RefusedError:
    return RefusedError("the first token cannot be in time", code=429, retry_after_s=retry_after_s)


async def test_keys_that_are_wrong_or_of_the_wrong_scope_are_refused(tmp_path: Path) -> None:
    token = make_key(tmp_path, "infer")
    async with (
        gateway_world(says("Hello."), run_dir=tmp_path) as world,
        served(world) as address,
        async_client_of(address, api_key=token) as client,
    ):
        answer = await client.chat.completions.create(**HELLO_TINY)
        with pytest.raises(openai.PermissionDeniedError):
            await client.fine_tuning.jobs.create(model=gateway.MODEL, training_file="file-x")
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="none").chat.completions.create(**HELLO_TINY)
    assert answer.choices[0].message.content == "Hello."


async def test_a_key_that_has_used_up_its_minute_is_told_when_to_come_back(tmp_path: Path) -> None:
    token = make_key(tmp_path, "infer", requests_per_minute=1)
    async with (
        gateway_world(says("Hello."), run_dir=tmp_path) as world,
        served(world) as address,
        async_client_of(address, api_key=token) as client,
    ):
        await client.chat.completions.create(**HELLO_TINY)
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(**HELLO_TINY)
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 60
