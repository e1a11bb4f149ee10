"""The Responses API through the official client, in front of a scripted cluster."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.support.gateway import CARD, MODEL, TOKENIZER, World, gateway_world, says, served

TEXT = "It was the answer."
CALL = '<tool_call>{"name": "now", "arguments": {"zone": "UTC"}}</tool_call>'
TOOL: Any = {
    "type": "function",
    "name": "now",
    "description": "Tells the time.",
    "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    "strict": False,
}


@asynccontextmanager
async def client_of(world: World) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        served(world) as address,
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def text_part(response: Any) -> Any:
    """The text of an answer that is one message."""
    return response.output[0].content[0]


async def prompt_of(world: World) -> str:
    """What the model read for the request that was submitted last."""
    return TOKENIZER.decode((await world.cluster.submitted.get()).prompt)


async def test_a_text_is_answered() -> None:
    async with gateway_world(says(TEXT)) as world, client_of(world) as client:
        response = await client.responses.create(
            model=MODEL, input="Say it", instructions="Be brief.", metadata={"a": "b"}, temperature=0
        )
        prompt = await prompt_of(world)

    assert response.output_text == TEXT
    assert (response.status, response.model, response.to_dict()["store"]) == ("completed", MODEL, False)
    assert (response.instructions, response.metadata, response.temperature) == ("Be brief.", {"a": "b"}, 0)
    turns = ("system\nBe brief.", "user\nSay it")
    assert prompt == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns) + "<|im_start|>assistant\n"
    assert response.usage is not None
    assert response.usage.input_tokens == len(TOKENIZER.encode_part(prompt))
    assert response.usage.output_tokens == len(TOKENIZER.encode(TEXT)) + 1


def test_the_synchronous_client_is_answered_and_streamed_to() -> None:
    def ask(address: str) -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            whole = client.responses.create(model=MODEL, input="Say it")
            with client.responses.stream(model=MODEL, input="Say it") as stream:
                stream.until_done()
                return whole.output_text, stream.get_final_response().output_text

    async def main() -> tuple[str, str]:
        async with gateway_world(says(TEXT)) as world, served(world) as address:
            return await asyncio.to_thread(ask, address)

    assert asyncio.run(main()) == (TEXT, TEXT)


async def test_a_stream_tells_the_same_as_the_whole_answer() -> None:
    async with gateway_world(says(TEXT)) as world, client_of(world) as client:
        events = [e async for e in await client.responses.create(model=MODEL, input="Say it", stream=True)]
        async with client.responses.stream(model=MODEL, input="Say it") as stream:
            final = await stream.get_final_response()

    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == final.output_text == TEXT
    assert [events[0].type, events[1].type, events[-1].type] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.usage is not None
    assert final.usage.output_tokens == len(TOKENIZER.encode(TEXT)) + 1


async def test_a_limit_makes_an_answer_incomplete() -> None:
    async with gateway_world(says(TEXT)) as world, client_of(world) as client:
        response = await client.responses.create(model=MODEL, input="Say it", max_output_tokens=2)
        task = await world.cluster.submitted.get()

    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert task.sampling.max_tokens == response.max_output_tokens == 2


async def test_a_tool_is_called_and_its_result_is_sent_back() -> None:
    async with gateway_world(says(f"Let me see.\n{CALL}")) as world, client_of(world) as client:
        response = await client.responses.create(model=MODEL, input="Time?", tools=[TOOL])
        async with client.responses.stream(model=MODEL, input="Time?", tools=[TOOL]) as stream:
            streamed = await stream.get_final_response()
    assert [item.type for item in response.output] == ["message", "function_call"]
    call = response.output[1]
    assert (call.name, call.arguments) == ("now", '{"zone": "UTC"}')
    assert [item.type for item in streamed.output] == ["message", "function_call"]
    assert streamed.output[1].arguments == call.arguments

    result = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
    conversation = [{"role": "user", "content": "Time?"}, *response.output, result]
    async with gateway_world(says(TEXT)) as world, client_of(world) as client:
        answer = await client.responses.create(model=MODEL, input=conversation)
        prompt = await prompt_of(world)
    assert answer.output_text == TEXT
    assert "assistant\nLet me see.<|im_end|>" in prompt
    assert "tool\nnoon<|im_end|>" in prompt


async def test_log_probabilities_are_included_when_they_are_asked_for() -> None:
    async with gateway_world(says(TEXT)) as world, client_of(world) as client:
        response = await client.responses.create(
            model=MODEL, input="Say it", include=["message.output_text.logprobs"], top_logprobs=2
        )
        plain = await client.responses.create(model=MODEL, input="Say it")

    logprobs = text_part(response).logprobs
    assert "".join(entry.token for entry in logprobs) == TEXT
    assert {len(entry.top_logprobs) for entry in logprobs} == {2}
    assert text_part(plain).logprobs == []


class Answer(BaseModel):
    """A form of an answer."""

    number: int


async def test_a_schema_reaches_the_model_and_its_answer_is_parsed() -> None:
    async with gateway_world(says('{"number": 4}')) as world, client_of(world) as client:
        response = await client.responses.parse(model=MODEL, input="2+2?", text_format=Answer)
        task = await world.cluster.submitted.get()

    assert response.output_parsed == Answer(number=4)
    assert task.sampling.grammar is not None
    assert "number" in task.sampling.grammar


async def test_a_refusal_names_the_parameter_of_this_api() -> None:
    async with gateway_world(says(TEXT)) as world, client_of(world) as client:
        asked: dict[str, Any] = {"model": MODEL, "input": "Say it"}
        for fields, param in (
            ({"previous_response_id": "resp-1"}, "previous_response_id"),
            ({"tools": [{"type": "web_search"}]}, "tools.0"),
            ({"max_output_tokens": CARD.context_length}, "input"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"input": [{"role": "user", "content": []}]}, "input.0.content"),
            ({"model": "gpt-4"}, "model"),
        ):
            with pytest.raises(openai.APIStatusError) as raised:
                await client.responses.create(**asked | fields)
            assert (raised.value.param, raised.value.status_code) == (param, 404 if param == "model" else 400)


async def test_a_failure_in_a_stream_is_told() -> None:
    async with gateway_world() as world, client_of(world) as client:
        answer = asyncio.create_task(client.responses.create(model=MODEL, input="a", stream=True))
        task = await world.cluster.submitted.get()
        await world.cluster.say(task, "It was")
        stream = await answer
        await world.cluster.fail(task, 500, "the node was lost")
        events = [event async for event in stream]

    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "the node was lost"
