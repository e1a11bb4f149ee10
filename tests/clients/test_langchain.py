"""LangChain's ChatOpenAI and OpenAI, as its users call them."""

from collections.abc import AsyncIterator
from typing import Any, Literal

import pytest
import pytest_asyncio
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from openai import DefaultAsyncHttpxClient
from pydantic import BaseModel

from tests.clients import weather
from tests.clients.ways import MODEL

MESSAGES = [SystemMessage("You know Python."), HumanMessage("What does open() do?")]


class Verdict(BaseModel):
    """What a model that is held to its schema must say; every such text is short."""

    answer: Literal["yes", "no", "perhaps"]
    sure: bool


ask_weather = tool("weather")(weather.weather)


@pytest_asyncio.fixture
async def http() -> AsyncIterator[DefaultAsyncHttpxClient]:
    """Connections that end with the event loop of a test: LangChain would keep its own."""
    async with DefaultAsyncHttpxClient() as http:
        yield http


def chat_model(address: str, **options: Any) -> ChatOpenAI:
    options = {"max_completion_tokens": 12, "temperature": 0, "max_retries": 0, **options}
    return ChatOpenAI(base_url=f"{address}/v1", api_key="none", model=MODEL, **options)


async def test_chat_gives_the_same_text_in_every_way(address: str, http: DefaultAsyncHttpxClient) -> None:
    model = chat_model(address, stream_usage=True, http_async_client=http)
    whole = model.invoke(MESSAGES)
    chunks = list(model.stream(MESSAGES))
    async_chunks = [chunk async for chunk in model.astream(MESSAGES)]
    texts = [whole.text, (await model.ainvoke(MESSAGES)).text]
    texts += ["".join(chunk.text for chunk in each) for each in (chunks, async_chunks)]
    assert len(set(texts)) == 1
    assert texts[0]
    assert whole.response_metadata["finish_reason"] == "length"
    streamed = sum(chunks[1:], chunks[0])
    assert whole.usage_metadata is not None
    assert streamed.usage_metadata is not None
    counts = [
        (each["input_tokens"], each["output_tokens"])
        for each in (whole.usage_metadata, streamed.usage_metadata)
    ]
    assert counts[0] == counts[1]
    assert counts[0][1] == 12


def test_several_conversations_at_once_and_stop_words(address: str) -> None:
    model = chat_model(address)
    text = model.invoke(MESSAGES).text
    assert [answer.text for answer in model.batch([MESSAGES] * 4)] == [text] * 4
    stop = text[len(text) // 2 :][:3]
    assert model.invoke(MESSAGES, stop=[stop]).text == text[: text.index(stop)]


def test_logprobs_are_in_the_metadata(address: str) -> None:
    answer = chat_model(address).bind(logprobs=True, top_logprobs=2).invoke(MESSAGES)
    scored = answer.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in scored) == answer.text


def test_a_real_model_is_held_to_a_schema(address: str) -> None:
    model = chat_model(address, max_completion_tokens=None)
    assert isinstance(model.with_structured_output(Verdict, method="json_schema").invoke(MESSAGES), Verdict)
    assert isinstance(model.with_structured_output(Verdict).invoke(MESSAGES), Verdict)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_parsed(weather_address: str, method: Any) -> None:
    structured = chat_model(weather_address, max_completion_tokens=None).with_structured_output(
        weather.Report, method=method, include_raw=True
    )
    told: Any = structured.invoke(weather.QUESTION)
    assert (told["parsed"], told["parsing_error"]) == (weather.REPORT, None)


def test_a_bound_tool_is_called_and_answered(weather_address: str) -> None:
    model = chat_model(weather_address, max_completion_tokens=None).bind_tools([ask_weather])
    messages: list[Any] = [HumanMessage(weather.QUESTION)]
    asked = model.invoke(messages)
    [call] = asked.tool_calls
    assert (call["name"], call["args"]) == ("weather", weather.ARGUMENTS)
    messages += [asked, ask_weather.invoke(call)]
    answer = model.invoke(messages)
    assert isinstance(answer, AIMessage)
    assert (answer.text, answer.tool_calls) == (weather.IN_WORDS, [])


def test_a_streamed_call_adds_up(weather_address: str) -> None:
    model = chat_model(weather_address, max_completion_tokens=None).bind_tools([ask_weather])
    chunks = list(model.stream(weather.QUESTION))
    whole = sum(chunks[1:], chunks[0])
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("weather", weather.ARGUMENTS)]


async def test_completions_give_the_same_text_in_every_way(
    address: str, http: DefaultAsyncHttpxClient
) -> None:
    model = OpenAI(
        base_url=f"{address}/v1",
        api_key="none",
        model=MODEL,
        max_tokens=12,
        temperature=0,
        max_retries=0,
        http_async_client=http,
    )
    prompt = "The open() function"
    texts = [
        model.invoke(prompt),
        "".join(model.stream(prompt)),
        await model.ainvoke(prompt),
        "".join([piece async for piece in model.astream(prompt)]),
    ]
    assert len(set(texts)) == 1
    assert texts[0]
