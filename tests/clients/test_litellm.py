"""LiteLLM's functions with the provider `openai`, as its users and its proxy call them."""

import gc
import importlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.clients import weather
from tests.clients.ways import MODEL

pytestmark = [
    # LiteLLM has pydantic read dictionary types of an identity provider's, whoever is asked.
    pytest.mark.filterwarnings("ignore:Items? .* (is|are) using the .ReadOnly. qualifier:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:Accessing the 'model_(computed_)?fields':pydantic.warnings.PydanticDeprecatedSince211"
    ),
    # LiteLLM leaves connections to the collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

MESSAGES = [{"role": "user", "content": "What does open() do?"}]


@pytest.fixture(scope="module")
def litellm() -> Any:
    """Imported where it is used: it takes ten seconds, and every process of the suite reads this file."""
    return importlib.import_module("litellm")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Has the connections that LiteLLM leaves behind collected here, and not in somebody else's test."""
    yield
    gc.collect()


def asked(address: str, **options: Any) -> dict[str, Any]:
    return {
        "model": f"openai/{MODEL}",
        "api_base": f"{address}/v1",
        "api_key": "none",
        "messages": MESSAGES,
        "num_retries": 0,
        **options,
    }


async def test_chat_gives_the_same_text_in_every_way(litellm: Any, address: str) -> None:
    fields = asked(address, max_tokens=12, temperature=0)
    whole = litellm.completion(**fields)
    async_whole = await litellm.acompletion(**fields)
    chunks = list(litellm.completion(**fields, stream=True))
    async_chunks = [chunk async for chunk in await litellm.acompletion(**fields, stream=True)]
    await litellm.close_litellm_async_clients()  # they belong to this test's event loop
    texts = [answer.choices[0].message.content for answer in (whole, async_whole)]
    texts += [
        "".join(chunk.choices[0].delta.content or "" for chunk in each) for each in (chunks, async_chunks)
    ]
    assert len(set(texts)) == 1
    assert texts[0]
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12


def test_a_stream_counts_its_tokens_when_asked(litellm: Any, address: str) -> None:
    fields = asked(address, max_tokens=12, temperature=0)
    whole = litellm.completion(**fields)
    chunks = list(litellm.completion(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_completions_are_streamed_and_whole(litellm: Any, address: str) -> None:
    fields = asked(address, max_tokens=12, temperature=0) | {"model": f"text-completion-openai/{MODEL}"}
    del fields["messages"]
    whole = litellm.text_completion(**fields, prompt="The open() function")
    pieces = litellm.text_completion(**fields, prompt="The open() function", stream=True)
    assert "".join(piece.choices[0].text or "" for piece in pieces) == whole.choices[0].text
    assert whole.choices[0].text


def test_a_tool_is_called_and_answered(litellm: Any, weather_address: str) -> None:
    messages: list[Any] = [{"role": "user", "content": weather.QUESTION}]
    fields = asked(weather_address, tools=[weather.TOOL], tool_choice="auto")
    first = litellm.completion(**fields | {"messages": messages}).choices[0]
    [call] = first.message.tool_calls
    assert first.finish_reason == "tool_calls"
    content = weather.weather(**json.loads(call.function.arguments))
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": content}]
    assert (
        litellm.completion(**fields | {"messages": messages}).choices[0].message.content == weather.IN_WORDS
    )


def test_an_answer_follows_the_schema_of_a_class(litellm: Any, weather_address: str) -> None:
    fields = asked(weather_address, messages=[{"role": "user", "content": weather.QUESTION}])
    answer = litellm.completion(**fields, response_format=weather.Report)
    assert weather.Report.model_validate_json(answer.choices[0].message.content) == weather.REPORT


def test_refusals_are_the_classes_of_litellm(litellm: Any, address: str) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**asked(address, temperature=3))
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**asked(address, model="openai/gpt-4o"))
