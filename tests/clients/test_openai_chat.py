"""The official Python client chats, blocking and not, streamed and whole, and has answers parsed."""

from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.clients.ways import MODEL, WAYS, Told, async_client_of, chat, complete

MESSAGES: list[Any] = [
    {"role": "system", "content": "You know Python."},
    {"role": "user", "content": [{"type": "text", "text": "What does open() do?"}]},
]
AS_TEXT = "system: You know Python.\nuser: What does open() do?\nassistant:"
"""What the embedded model's chat template makes of it."""
GREEDY: dict[str, Any] = {"messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}


class Verdict(BaseModel):
    """What a model that is held to its schema must say; every such text is short."""

    answer: Literal["yes", "no", "perhaps"]
    sure: bool


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_asking_completes_the_text_of_the_template(client: openai.OpenAI, way: str) -> None:
    completed = complete(client, prompt=AS_TEXT, max_tokens=12, temperature=0)
    assert chat(client, way, **GREEDY) == completed


@pytest.mark.parametrize("way", WAYS)
def test_every_choice_is_told_under_its_index(client: openai.OpenAI, way: str) -> None:
    [alone] = chat(client, **GREEDY)
    assert chat(client, way, **GREEDY, n=3) == [alone] * 3


@pytest.mark.parametrize("way", WAYS)
def test_a_stop_string_ends_the_answer(client: openai.OpenAI, way: str) -> None:
    [(text, reason)] = chat(client, **GREEDY)
    assert reason == "length"
    stop = text[len(text) // 2 :][:3]
    assert chat(client, way, **GREEDY, stop=[stop, *"0123456789#%&/=@"][:16]) == [
        (text[: text.index(stop)], "stop")
    ]


def test_the_same_seed_gives_the_same_answer_among_others_too(client: openai.OpenAI) -> None:
    def draw(seed: int, n: int) -> Told:
        return chat(client, messages=MESSAGES, max_tokens=12, temperature=1, top_p=0.9, seed=seed, n=n)

    [alone] = draw(7, 1)
    several = draw(7, 3)
    assert several[0] == alone
    assert len(set(several)) > 1


def test_logprobs_are_those_of_the_same_text_in_completions(client: openai.OpenAI) -> None:
    said = client.chat.completions.create(model=MODEL, **GREEDY, logprobs=True, top_logprobs=3)
    scored = client.completions.create(
        model=MODEL, prompt=AS_TEXT, max_tokens=12, temperature=0, logprobs=3
    ).choices[0]
    logprobs = said.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and scored.logprobs is not None
    told = [token.logprob for token in logprobs.content]
    assert told == pytest.approx(scored.logprobs.token_logprobs, abs=1e-4)
    assert bytes(byte for token in logprobs.content for byte in token.bytes or []).decode() == scored.text
    for token in logprobs.content:
        likely = [top.logprob for top in token.top_logprobs]
        assert likely == sorted(likely, reverse=True)
        assert (likely[0], len(likely)) == (token.logprob, 3)


def test_a_raw_answer_shows_its_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, **GREEDY, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["lemix-weights-version"] == "0-0"
    assert raw.request_id == "mine-1"
    assert raw.parse().choices[0].finish_reason == "length"


def test_a_raw_stream_is_read_line_by_line(client: openai.OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, **GREEDY, stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_the_clients_stream_helper_accumulates_the_answer(client: openai.OpenAI) -> None:
    [(text, _)] = chat(client, **GREEDY)
    ended: dict[str, Any] = {**GREEDY, "stop": text[-1]}
    with client.chat.completions.stream(
        model=MODEL, **ended, stream_options={"include_usage": True}
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content == text.partition(text[-1])[0]
    assert final.usage is not None
    assert 0 < final.usage.completion_tokens <= 12


def test_an_answer_is_parsed_into_a_model_s_class(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Verdict, temperature=1, seed=3
    )
    [choice] = parsed.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Verdict)


async def test_answers_are_parsed_without_blocking_and_from_a_stream(address: str) -> None:
    asked: Any = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "response_format": Verdict}
    async with async_client_of(address) as client:
        whole = await client.chat.completions.parse(**asked)
        async with client.chat.completions.stream(**asked) as stream:
            streamed = await stream.get_final_completion()
    assert isinstance(whole.choices[0].message.parsed, Verdict)
    assert streamed.choices[0].message.parsed == whole.choices[0].message.parsed


def test_an_answer_that_is_cut_off_cannot_be_parsed(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model=MODEL, messages=MESSAGES, response_format=Verdict, max_completion_tokens=2
        )
