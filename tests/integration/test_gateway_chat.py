"""Chat completions over HTTP, by the official client, in front of a scripted cluster."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from math import nan
from typing import Any, TypeVar

import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

from shared.messages.inference import InferenceTask, SequenceResult, TokenLogprob
from tests.support.gateway import (
    CARD,
    MODEL,
    TOKENIZER,
    VERSION,
    Script,
    World,
    gateway_world,
    says,
    schema_of,
    served,
)

TEXT = "Well, naïve 😀 world! The end."
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Say it"}]}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object"}},
}
Result = TypeVar("Result")


@asynccontextmanager
async def clients(
    script: Script | None, **settings: Any
) -> AsyncIterator[tuple[openai.AsyncOpenAI, openai.OpenAI, World]]:
    async with (
        gateway_world(script, **settings) as world,
        served(world) as address,
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as sync_client:
            yield client, sync_client, world


async def in_thread(work: Callable[[], Result]) -> Result:
    return await asyncio.to_thread(work)


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


async def test_an_answer_has_openais_shape() -> None:
    async with gateway_world(says(TEXT)) as world:
        response = await world.http.post("/v1/chat/completions", json=ASK)
        task = world.cluster.submitted.get_nowait()
    body, num_tokens = response.json(), len(TOKENIZER.encode(TEXT)) + 1
    assert response.headers["lemix-weights-version"] == f"{VERSION}-{VERSION}"
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": MODEL,
        "system_fingerprint": f"weights-{VERSION}-{VERSION}",
        "service_tier": "default",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "lemix": {"versions": [{"version": VERSION, "first_token": 0, "last_token": num_tokens - 1}]},
            }
        ],
        "usage": {
            "prompt_tokens": len(task.prompt),
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens": num_tokens,
            "total_tokens": len(task.prompt) + num_tokens,
        },
    }


async def test_the_client_gets_the_same_text_whole_and_streamed_in_both_ways() -> None:
    streaming: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    async with clients(says(TEXT)) as (client, sync_client, _):
        whole = await client.chat.completions.create(**ASK)
        chunks = [chunk async for chunk in await client.chat.completions.create(**ASK, **streaming)]
        sync_whole = await in_thread(lambda: sync_client.chat.completions.create(**ASK))
        sync_chunks = await in_thread(lambda: list(sync_client.chat.completions.create(**ASK, **streaming)))
    for answer in (whole, sync_whole):
        assert answer.choices[0].message.content == TEXT
        assert answer.choices[0].finish_reason == "stop"
    for stream in (chunks, sync_chunks):
        assert stream[0].choices[0].delta.role == "assistant"
        assert text_of(stream) == TEXT
        assert [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1] == "stop"
        assert all(chunk.usage is None for chunk in stream[:-1])
        assert stream[-1].usage == whole.usage
        assert stream[-1].choices == []
        assert len({chunk.id for chunk in stream}) == 1


async def test_each_choice_is_streamed_under_its_index() -> None:
    async with clients(says(TEXT)) as (client, _, world):
        stream = await client.chat.completions.create(**ASK, n=2, seed=5, stream=True)
        chunks = [chunk async for chunk in stream]
        tasks = [world.cluster.submitted.get_nowait() for _ in range(2)]
    assert [task.sampling.seed for task in tasks] == [5, 6]
    assert all(chunk.usage is None for chunk in chunks)
    for index in range(2):
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert text_of(chunks, index) == TEXT
        assert [choice.delta.role for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
        assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


async def test_an_answer_is_cut_at_its_limit_and_before_a_stop_string() -> None:
    async with clients(says(TEXT)) as (client, _, world):
        cut = await client.chat.completions.create(**ASK, max_completion_tokens=3)
        stopped = await client.chat.completions.create(**ASK, stop=["world", *"0123456789#%&/="])
        await client.chat.completions.create(**ASK)
        tasks = [world.cluster.submitted.get_nowait() for _ in range(3)]
    assert cut.choices[0].finish_reason == "length"
    assert cut.choices[0].message.content == TOKENIZER.decode(TOKENIZER.encode(TEXT)[:3])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == TEXT.partition("world")[0]
    assert tasks[2].sampling.max_tokens == CARD.context_length - len(tasks[2].prompt)


async def test_log_probabilities_describe_the_tokens_of_the_text() -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    async with clients(says(TEXT)) as (client, _, _):
        whole = await client.chat.completions.create(**ASK, **fields)
        chunks = [chunk async for chunk in await client.chat.completions.create(**ASK, **fields, stream=True)]
        without_top = await client.chat.completions.create(**ASK, logprobs=True)
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content or []
    assert bytes(byte for token in content for byte in token.bytes or []).decode() == TEXT
    assert {token.logprob for token in content} == {-1.0}
    assert [top.logprob for top in content[0].top_logprobs] == [-1.0, -2.0]
    streamed = [choice.logprobs.content or [] for c in chunks for choice in c.choices if choice.logprobs]
    assert [token for tokens in streamed for token in tokens] == content
    assert without_top.choices[0].logprobs is not None


async def test_calls_of_tools_are_parsed_whole_and_streamed() -> None:
    fields: dict[str, Any] = {"tools": [WEATHER]}
    async with clients(says(f"Let me look.\n{CALL}\n{CALL}")) as (client, _, _):
        whole = (await client.chat.completions.create(**ASK, **fields)).choices[0]
        chunks = [chunk async for chunk in await client.chat.completions.create(**ASK, **fields, stream=True)]
        one = (await client.chat.completions.create(**ASK, **fields, parallel_tool_calls=False)).choices[0]
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", "Let me look.")
    calls = whole.message.tool_calls or []
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Łódź"}] * 2
    assert len({call.id for call in calls}) == 2
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [delta.index for delta in deltas if delta.id] == [0, 1]
    arguments = "".join(delta.function.arguments or "" for delta in deltas if delta.index == 1)
    assert json.loads(arguments) == {"city": "Łódź"}
    assert text_of(chunks) == "Let me look."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert len(one.message.tool_calls or []) == 1


async def test_without_tools_a_call_is_text() -> None:
    async with clients(says(CALL)) as (client, _, _):
        plain = (await client.chat.completions.create(**ASK)).choices[0]
        forbidden = (await client.chat.completions.create(**ASK, tools=[WEATHER], tool_choice="none")).choices
    for choice in (plain, forbidden[0]):
        assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == (
            "stop",
            CALL,
            None,
        )


async def test_a_call_that_is_cut_off_is_text() -> None:
    async with clients(says(CALL)) as (client, _, _):
        answer = await client.chat.completions.create(**ASK, tools=[WEATHER], max_tokens=9)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert choice.message.content == TOKENIZER.decode(TOKENIZER.encode(CALL)[:9])


async def test_a_strict_tool_of_the_client_library_is_called_freely_or_by_its_schema() -> None:
    tool = openai.pydantic_function_tool(Weather, name="weather")
    async with clients(says(CALL)) as (client, _, world):
        answer = await client.chat.completions.parse(**ASK, tools=[tool])
        grammar = world.cluster.submitted.get_nowait().sampling.grammar
    [call] = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    assert "weather" in (grammar or "")


async def test_a_tool_that_must_be_called_is_asked_for_by_a_schema() -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    async with clients(says('{"name": "weather", "arguments": {"city": "Rome"}}')) as (client, _, world):
        choice = (await client.chat.completions.create(**ASK, tools=[WEATHER], tool_choice=named)).choices[0]
        schema = schema_of(world.cluster.submitted.get_nowait())
    [call] = choice.message.tool_calls or []
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "weather")
    assert choice.message.content is None
    assert schema is not None and schema["properties"]["name"] == {"const": "weather"}


class Weather(BaseModel):
    """What the client's own parser reads."""

    city: str


async def test_the_clients_parser_of_structured_answers_works() -> None:
    async with clients(says('{"city": "Rome"}')) as (client, _, world):
        answer = await client.chat.completions.parse(**ASK, response_format=Weather)
        schema = schema_of(world.cluster.submitted.get_nowait())
    assert answer.choices[0].message.parsed == Weather(city="Rome")
    assert schema is not None and schema["properties"]["city"]["type"] == "string"


async def test_mistakes_are_the_clients_own_errors() -> None:
    async with clients(says("fine")) as (client, sync_client, _):
        with pytest.raises(openai.BadRequestError, match="image_url") as caught:
            part: Any = {"type": "image_url", "image_url": {"url": "data:"}}
            await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [part]}])
        with pytest.raises(openai.NotFoundError, match="gpt-4"):
            await in_thread(lambda: sync_client.chat.completions.create(**ASK | {"model": "gpt-4"}))
    assert caught.value.param == "messages.0.content"


async def test_a_model_without_a_template_is_a_clear_error() -> None:
    async with clients(says("x"), template=None) as (client, _, _):
        with pytest.raises(openai.BadRequestError, match="LEMIX_CHAT_TEMPLATE"):
            await client.chat.completions.create(**ASK)


async def test_a_failure_in_a_stream_reaches_the_client() -> None:
    async with clients(None) as (client, _, world):
        answer = asyncio.create_task(client.chat.completions.create(**ASK, stream=True))
        task = await world.cluster.submitted.get()
        await world.cluster.say(task, "It was")
        stream = await answer
        await world.cluster.fail(task, 500, "the node was lost")
        with pytest.raises(openai.APIError, match="the node was lost"):
            async for _ in stream:
                pass


@pytest.mark.parametrize("stream", [False, True])
async def test_a_log_probability_that_is_no_number_is_an_error_of_the_server(stream: bool) -> None:
    def sick(task: InferenceTask) -> list[SequenceResult]:
        token = TokenLogprob(token=5, logprob=nan, top=((5, nan),))
        return [SequenceResult(task_id=task.task_id, token=token)]

    async with gateway_world(sick) as world:
        for url, fields in (
            ("/v1/chat/completions", ASK | {"logprobs": True}),
            ("/v1/completions", {"model": MODEL, "prompt": "x", "logprobs": 1}),
        ):
            response = await world.http.post(url, json=fields | {"stream": stream})
            assert response.status_code == 500
            assert "no number" in response.json()["error"]["message"]
