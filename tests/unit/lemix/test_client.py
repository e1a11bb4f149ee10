import json
from typing import Any

import httpx
import pytest

from lemix.client import ApiClient, ApiError, Score


def api(status: int, body: str, requests: list[dict[str, Any]] | None = None) -> ApiClient:
    """A client whose every request gets this answer."""

    def answer(request: httpx.Request) -> httpx.Response:
        if requests is not None:
            requests.append(json.loads(request.content))
        return httpx.Response(status, text=body)

    return ApiClient("http://api", model="m", transport=httpx.MockTransport(answer))


def events(*contents: object) -> str:
    return "".join(f"data: {json.dumps(content)}\n\n" for content in contents) + "data: [DONE]\n\n"


def chunk(text: str, fingerprint: str | None, finish: str | None = None) -> dict[str, object]:
    return {
        "system_fingerprint": fingerprint,
        "choices": [{"text": text, "finish_reason": finish}],
        "usage": None,
    }


USAGE = {
    "system_fingerprint": "weights-3-5",
    "choices": [],
    "usage": {"prompt_tokens": 2, "completion_tokens": 3},
}


async def test_a_stream_becomes_a_completion_with_a_time_for_each_token() -> None:
    requests: list[dict[str, Any]] = []
    stream = events(
        chunk("a", "weights-3-3"), chunk("b", "weights-3-5"), chunk("", "weights-3-5", "length"), USAGE
    )
    async with api(200, stream, requests) as client:
        completion = await client.complete("p", max_tokens=3, temperature=0)
    assert (completion.text, completion.finish_reason) == ("ab", "length")
    assert (completion.prompt_tokens, completion.completion_tokens) == (2, 3)
    assert completion.weights_versions == (3, 5)
    assert completion.ttft_s >= 0
    assert len(completion.tbt_s) == 1
    assert requests[0]["temperature"] == 0 and requests[0]["max_tokens"] == 3 and requests[0]["model"] == "m"


async def test_a_chat_is_timed_as_a_completion_is() -> None:
    requests: list[dict[str, Any]] = []
    deltas: list[dict[str, object]] = [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "b"},
        {},
    ]
    chunks = [
        {"system_fingerprint": "weights-3-5", "choices": [{"delta": delta, "finish_reason": finish}]}
        for delta, finish in zip(deltas, (None, None, None, "stop"), strict=True)
    ]
    async with api(200, events(*chunks, USAGE), requests) as client:
        answer = await client.chat("hello", max_tokens=3)
    assert (answer.text, answer.finish_reason, len(answer.tbt_s)) == ("ab", "stop", 1)
    assert requests[0]["messages"] == [{"role": "user", "content": "hello"}]
    assert requests[0]["max_completion_tokens"] == 3


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (429, '{"error": {"message": "full"}}', "HTTP 429: full"),
        (502, "bad gateway", "HTTP 502: bad gateway"),
        (200, events(chunk("a", "weights-0-0"), {"error": {"message": "stage lost"}}), "stage lost"),
        (200, events(chunk("a", "weights-0-0")), "the stream ended before"),
        (
            200,
            events(chunk("a", None, "stop"), {**USAGE, "system_fingerprint": None}),
            "does not say which weights",
        ),
    ],
)
async def test_an_answer_that_is_not_whole_is_an_error(status: int, body: str, error: str) -> None:
    async with api(status, body) as client:
        with pytest.raises(ApiError, match=error):
            await client.complete("p", max_tokens=3)


async def test_a_score_sums_all_tokens_but_the_first() -> None:
    requests: list[dict[str, Any]] = []
    body = json.dumps({"choices": [{"logprobs": {"token_logprobs": [None, -1.5, -0.5]}}]})
    async with api(200, body, requests) as client:
        assert await client.score("text") == Score(nll_sum=2.0, num_tokens=2)
    assert requests == [{"model": "m", "prompt": "text", "max_tokens": 0, "echo": True, "logprobs": 0}]


async def test_a_refused_score_is_an_error() -> None:
    async with api(400, '{"error": {"message": "too long"}}') as client:
        with pytest.raises(ApiError, match="HTTP 400: too long"):
            await client.score("text")
