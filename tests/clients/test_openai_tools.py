"""The official Python client has a model call tools, whole and streamed, until it knows the answer."""

import json
from typing import Any

import openai
import pytest
from openai.lib.streaming.chat import FunctionToolCallArgumentsDoneEvent

from tests.clients.ways import MODEL, async_client_of
from tests.clients.weather import ARGUMENTS, IN_WORDS, QUESTION, REPORT, TOOL, Report, weather

ASKED: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_loop_of_calls_ends_with_an_answer(weather_client: openai.OpenAI, streamed: bool) -> None:
    messages = list(ASKED)
    reasons = []
    while not reasons or reasons[-1] == "tool_calls":
        choice = _next_turn(weather_client, messages, streamed)
        reasons.append(choice.finish_reason)
        messages.append(choice.message)
        for call in choice.message.tool_calls or []:
            content = weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    assert reasons == ["tool_calls", "stop"]
    assert messages[-1].content == IN_WORDS


def _next_turn(client: openai.OpenAI, messages: list[Any], streamed: bool) -> Any:
    if not streamed:
        return client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL]).choices[0]
    with client.chat.completions.stream(model=MODEL, messages=messages, tools=[TOOL]) as stream:
        return stream.get_final_completion().choices[0]


def test_the_stream_helper_tells_of_whole_arguments(weather_client: openai.OpenAI) -> None:
    with weather_client.chat.completions.stream(model=MODEL, messages=ASKED, tools=[TOOL]) as stream:
        done = [event for event in stream if isinstance(event, FunctionToolCallArgumentsDoneEvent)]
    assert [(event.name, json.loads(event.arguments)) for event in done] == [("weather", ARGUMENTS)]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Report"}}])
def test_a_call_that_is_demanded_is_parsed_into_its_class(weather_client: openai.OpenAI, choice: Any) -> None:
    parsed = weather_client.chat.completions.parse(
        model=MODEL, messages=ASKED, tools=[openai.pydantic_function_tool(Report)], tool_choice=choice
    )
    [call] = parsed.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == REPORT
    assert parsed.choices[0].finish_reason == "tool_calls"


def test_tools_that_must_not_be_called_are_not_shown_to_the_model(weather_client: openai.OpenAI) -> None:
    answer = weather_client.chat.completions.create(
        model=MODEL, messages=ASKED, tools=[TOOL], tool_choice="none"
    )
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (IN_WORDS, "stop")


async def test_calls_come_without_blocking(weather_address: str) -> None:
    async with async_client_of(weather_address) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=ASKED, tools=[TOOL])
        stream = await client.chat.completions.create(model=MODEL, messages=ASKED, tools=[TOOL], stream=True)
        deltas = [chunk.choices[0].delta async for chunk in stream]
    [call] = whole.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments) == ARGUMENTS
    pieces = [call for delta in deltas for call in delta.tool_calls or []]
    assert json.loads("".join(piece.function.arguments or "" for piece in pieces)) == ARGUMENTS
    assert len({piece.id for piece in pieces if piece.id}) == 1
