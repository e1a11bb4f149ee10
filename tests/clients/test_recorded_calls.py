"""The calls of tools that are too heavy to install here, as their sources send them, in their order."""

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.support.gateway import MODEL, gateway_world, says, served

ORIGIN = "http://chat.example:3000"
ANSWER = "Hello, how can I help?"
HELLO = {"role": "user", "content": "Hello"}


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway behind a real socket; its model always says ANSWER."""
    async with (
        gateway_world(says(ANSWER), cors_origins=ORIGIN) as world,
        served(world) as address,
        httpx.AsyncClient(base_url=address, trust_env=False) as http,
    ):
        yield http


def events_of(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


async def test_open_webui_lists_models_chats_and_asks_for_title_tags_and_follow_ups(
    http: httpx.AsyncClient,
) -> None:
    for path in ("/v1/models", "/v1/models/"):
        listed = await http.get(path, headers={"Authorization": "Bearer none"})
        assert [model["id"] for model in listed.json()["data"]] == [MODEL]
    chat = {
        "stream": True,
        "model": MODEL,
        "messages": [HELLO],
        "stream_options": {"include_usage": True},
    }
    *events, last = events_of(await http.post("/v1/chat/completions", json=chat))
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == ANSWER
    assert last["usage"]["completion_tokens"] > 0
    hidden = {"model": MODEL, "messages": [HELLO], "stream": False}
    for more in ({"max_completion_tokens": 900}, {}, {}):  # title, tags, follow-ups
        answer = (await http.post("/v1/chat/completions", json=hidden | more)).json()
        assert answer["choices"][0]["message"]["content"] == ANSWER


async def test_llama_index_chats_and_completes(http: httpx.AsyncClient) -> None:
    chat = {"model": MODEL, "messages": [HELLO], "temperature": 0.1}
    answer = (await http.post("/v1/chat/completions", json=chat | {"stream": False})).json()
    assert answer["choices"][0]["message"]["content"] == ANSWER
    events = events_of(await http.post("/v1/chat/completions", json=chat | {"stream": True}))
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == ANSWER
    completion = {"model": MODEL, "prompt": "Hello", "temperature": 0.1, "stream": False, "max_tokens": 1000}
    answer = (await http.post("/v1/completions", json=completion)).json()
    assert answer["choices"][0]["text"] == ANSWER


async def test_instructor_demands_a_call_and_asks_again_when_its_arguments_are_wrong() -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    tool = {
        "type": "function",
        "function": {"name": "User", "description": "A person.", "parameters": schema},
    }
    choice = {"type": "function", "function": {"name": "User"}}
    asked = {"model": MODEL, "messages": [HELLO], "tools": [tool], "tool_choice": choice}
    async with gateway_world(says('{"name": "User", "arguments": {"age": 7}}')) as world:
        answer = (await world.http.post("/v1/chat/completions", json=asked)).json()
        [call] = answer["choices"][0]["message"]["tool_calls"]
        dumped = {"role": "assistant", "content": "", "tool_calls": [call]}
        wrong = {"role": "tool", "tool_call_id": call["id"], "name": "User", "content": "age: 8 or more"}
        more = asked | {"messages": [HELLO, dumped, wrong]}
        again = (await world.http.post("/v1/chat/completions", json=more)).json()
    assert call["function"]["name"] == "User"
    assert json.loads(call["function"]["arguments"]) == {"age": 7}
    assert again["choices"][0]["message"]["tool_calls"][0]["function"] == call["function"]


async def test_a_page_in_a_browser_asks_first_whether_it_may(http: httpx.AsyncClient) -> None:
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    allowed = await http.options("/v1/chat/completions", headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    body = {"model": MODEL, "messages": [HELLO]}
    answer = await http.post("/v1/chat/completions", json=body, headers={"Origin": ORIGIN})
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    stranger = await http.options("/v1/chat/completions", headers=asked | {"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in stranger.headers


@pytest.mark.parametrize("num_stops", [9, 14])
async def test_continue_completes_code_with_many_stops(http: httpx.AsyncClient, num_stops: int) -> None:
    stops = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "/src/", "#- coding: utf-8", "```"]
    stops += ["\nclass ", "\nfunction ", "how", "\nimport ", "\ninterface ", "\nmodule ", "\n\n", "\r\n"]
    body = {"model": MODEL, "prompt": "def f(", "stream": True, "max_tokens": 200, "temperature": 0.01}
    events = events_of(await http.post("/v1/completions", json=body | {"stop": stops[:num_stops]}))
    assert "".join(event["choices"][0]["text"] for event in events) == ANSWER.partition("how")[0]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "more",
    [
        {"best_of": 1, "repetition_penalty": 1.0, "ignore_eos": True, "logprobs": None},  # vllm bench serve
        {"best_of": 1, "ignore_eos": True},  # sglang bench
        {"min_tokens": 4, "ignore_eos": True, "stop": None},  # guidellm
    ],
)
async def test_benchmarks_of_completions_get_as_many_tokens_as_they_ask_for(
    http: httpx.AsyncClient, more: dict[str, Any]
) -> None:
    body = {
        "model": MODEL,
        "prompt": "def f(",
        "temperature": 0.0,
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    *_, last = events_of(await http.post("/v1/completions", json=body | more))
    assert last["usage"]["completion_tokens"] == 4


async def test_benchmarks_of_chat_get_as_many_tokens_as_they_ask_for(http: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "Hello"}]
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0.0,
        "max_completion_tokens": 4,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    *events, last = events_of(await http.post("/v1/chat/completions", json=body))
    assert last["usage"]["completion_tokens"] == 4
    so_far = [event["usage"]["completion_tokens"] for event in events]
    assert so_far == sorted(so_far)
    assert so_far[-1] == 4


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_probes_are_answered(http: httpx.AsyncClient, method: str) -> None:
    asked = http.build_request(method, "/health", headers={"User-Agent": "kube-probe/1.31", "Accept": "*/*"})
    assert (await http.send(asked)).status_code == 200


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": MODEL, "prompt": "Hello"},
    "/v1/chat/completions": {"model": MODEL, "messages": [HELLO]},
}


@pytest.mark.parametrize("url", list(ROUTES))
@pytest.mark.parametrize(
    "more",
    [
        {"user": "u1"},
        {"stop": ""},
        {"ignore_eos": False},
        {"top_k": -1},
        {"min_p": 0},
        {"repetition_penalty": 1.0},
        {"metadata": {}},
        {"store": False},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_obfuscation": False}},
        {"max_completion_tokens": 16},
        {"logprobs": False},
    ],
    ids=lambda more: next(iter(more)),
)
async def test_row_2_what_changes_nothing_passes(
    http: httpx.AsyncClient, url: str, more: dict[str, Any]
) -> None:
    plain, answer = [
        (await http.post(url, json=ROUTES[url] | {"seed": 1} | fields)).json() for fields in ({}, more)
    ]
    assert answer["choices"] == plain["choices"]
    assert answer["usage"] == plain["usage"]


@pytest.mark.parametrize("url", list(ROUTES))
async def test_row_3_numbers_written_as_fractions_are_whole(http: httpx.AsyncClient, url: str) -> None:
    answer = (await http.post(url, json=ROUTES[url] | {"max_tokens": 2.0})).json()
    assert answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("url", "wrong", "limit"),
    [
        ("/v1/completions", {"max_tokens": -1}, "greater than or equal to 0"),
        ("/v1/chat/completions", {"max_tokens": -1}, "greater than or equal to 1"),
        *((url, {"top_p": 0}, "greater than 0") for url in ROUTES),
        *((url, {"seed": 2**63}, "less than or equal to 9223372036854775807") for url in ROUTES),
    ],
)
async def test_row_3_a_number_out_of_range_is_refused_with_the_range(
    http: httpx.AsyncClient, url: str, wrong: dict[str, Any], limit: str
) -> None:
    refused = await http.post(url, json=ROUTES[url] | wrong)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, next(iter(wrong)))
    assert limit in error["message"]


async def test_row_4_an_idle_connection_is_used_again_two_hundred_times(http: httpx.AsyncClient) -> None:
    connections = set()
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 1}
    for _ in range(200):
        async with http.stream("POST", "/v1/completions", json=body) as response:
            connections.add(response.extensions["network_stream"].get_extra_info("client_addr"))
            await response.aread()
        assert response.status_code == 200
    assert len(connections) == 1


async def test_row_6_a_compressed_body_is_decoded_or_refused(http: httpx.AsyncClient) -> None:
    packed = gzip.compress(json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": 1}).encode())
    for encoding, status in (("gzip", 200), ("br", 415)):
        headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
        assert (await http.post("/v1/completions", content=packed, headers=headers)).status_code == status
