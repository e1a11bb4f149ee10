"""The official Python client asks for completions, blocking and not, streamed and whole."""

import asyncio
from typing import Any

import openai
import pytest

from tests.clients.ways import MODEL, WAYS, Told, async_client_of, complete

PROMPT = "The open() function"
GREEDY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_asking_gives_the_same_text(client: openai.OpenAI, way: str) -> None:
    assert complete(client, way, **GREEDY) == complete(client, **GREEDY)


@pytest.mark.parametrize("way", WAYS)
def test_choices_of_several_prompts_come_in_order(client: openai.OpenAI, way: str) -> None:
    prompts = [PROMPT, "Return the"]
    [first], [second] = (complete(client, **GREEDY | {"prompt": prompt}) for prompt in prompts)
    assert complete(client, way, **GREEDY | {"prompt": prompts}, n=2) == [first, first, second, second]


@pytest.mark.parametrize("way", WAYS)
def test_a_stop_string_ends_the_text(client: openai.OpenAI, way: str) -> None:
    [(text, reason)] = complete(client, **GREEDY)
    assert reason == "length"
    stop = text[len(text) // 2 :][:3]
    [(cut, reason)] = complete(client, way, **GREEDY, stop=stop)
    assert (cut, reason) == (text[: text.index(stop)], "stop")


def test_the_same_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    def draw(seed: int) -> Told:
        return complete(client, prompt=PROMPT, max_tokens=16, n=2, temperature=1.0, seed=seed)

    first = draw(1)
    assert draw(1) == first
    assert draw(2) != first


def test_echo_and_logprobs_describe_the_prompt_and_the_answer(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, **GREEDY, logprobs=2, echo=True)
    [choice], logprobs = whole.choices, whole.choices[0].logprobs
    assert choice.text.startswith(PROMPT)
    assert logprobs is not None and logprobs.tokens is not None and logprobs.token_logprobs is not None
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.token_logprobs[0] is None
    assert all(each < 0 for each in logprobs.token_logprobs[1:])
    assert whole.usage is not None
    assert len(logprobs.tokens) == whole.usage.total_tokens


def test_a_stream_ends_with_the_usage_when_asked(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, **GREEDY, stream=True, stream_options={"include_usage": True}
    )
    *others, last = stream
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == GREEDY["max_tokens"]
    assert all(chunk.usage is None for chunk in others)


def test_a_reader_that_leaves_a_stream_early_goes_on_with_the_same_client(client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    assert complete(client, **GREEDY)[0][1] == "length"


async def test_many_requests_at_once_are_answered_each_by_itself(address: str) -> None:
    async with async_client_of(address) as client:

        async def tokens_of(length: int) -> int:
            whole = await client.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=length, temperature=0
            )
            assert whole.usage is not None
            return whole.usage.completion_tokens

        lengths = [1 + number % 5 for number in range(20)]
        assert await asyncio.gather(*map(tokens_of, lengths)) == lengths
