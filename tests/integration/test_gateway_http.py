"""The gateway over HTTP, in front of a scripted cluster: answers, streams, errors, disconnects."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from lemix.simulation.loop import run_virtual
from services.gateway.generation import IN_LINE_AFTER_S, REFUSALS_WITHIN_S
from services.gateway.sent_sequence import MAX_TRIES
from shared.bus.base import Incoming
from shared.bus.memory import MemoryBus
from shared.errors import BusError
from shared.messages.base import Message
from shared.messages.inference import CancelTask, Objective, SequenceResult, TokenLogprob
from shared.messages.weights import JudgedVersion, NodeWeights, WeightsRequest, WeightsStatus
from shared.subjects import NODE_WEIGHTS, Subject
from tests.support.gateway import (
    CARD,
    MODEL,
    NODE,
    TOKENIZER,
    VERSION,
    World,
    gateway_world,
    results_of,
    says,
    served,
)

URL = "/v1/completions"
JSON = {"content-type": "application/json"}
TEXT = "Well, naïve 😀 world! The end."
EOS = CARD.eos_token_ids[0]


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Say it", "max_tokens": 40} | fields


def events_of(body: str) -> list[dict[str, Any]]:
    """The JSON events of a stream, which must have its end mark."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


async def read_stream(address: str, lines: asyncio.Queue[str]) -> None:
    """Ask for a stream and pass its events on, one by one."""
    request: dict[str, Any] = {"url": address + URL, "json": ask(stream=True)}
    async with httpx.AsyncClient() as http, http.stream("POST", **request) as response:
        async for line in response.aiter_lines():
            if line:
                lines.put_nowait(line)


# Answers


async def test_answer_has_openais_shape() -> None:
    async with gateway_world(says(TEXT)) as world:
        response = await world.http.post(URL, json=ask())
    body, num_tokens = response.json(), len(TOKENIZER.encode(TEXT)) + 1
    assert response.status_code == 200
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    num_prompt_tokens = len(TOKENIZER.encode("Say it"))
    assert body == {
        "object": "text_completion",
        "model": MODEL,
        "system_fingerprint": f"weights-{VERSION}-{VERSION}",
        "service_tier": "default",
        "choices": [
            {
                "index": 0,
                "text": TEXT,
                "logprobs": None,
                "finish_reason": "stop",
                "lemix": {"versions": [{"version": VERSION, "first_token": 0, "last_token": num_tokens - 1}]},
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt_tokens + num_tokens,
        },
    }


async def test_answer_is_cut_at_max_tokens() -> None:
    async with gateway_world(says(TEXT)) as world:
        choice = (await world.http.post(URL, json=ask(max_tokens=3))).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["text"] == TOKENIZER.decode(TOKENIZER.encode(TEXT)[:3])


async def test_every_choice_of_every_prompt_is_answered_in_order() -> None:
    async with gateway_world(lambda task: results_of(task, [*task.prompt, EOS])) as world:
        prompts = ["first one", "second"]
        body = (await world.http.post(URL, json=ask(prompt=prompts, n=2, seed=3))).json()
        tasks = [world.cluster.submitted.get_nowait() for _ in range(4)]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == ["first one"] * 2 + ["second"] * 2
    assert [task.sampling.seed for task in tasks] == [3, 4, 3, 4]
    assert body["usage"]["prompt_tokens"] == sum(len(TOKENIZER.encode(prompt)) for prompt in prompts)


async def test_seed_is_drawn_when_none_is_given() -> None:
    async with gateway_world(says("x")) as world:
        for _ in range(2):
            await world.http.post(URL, json=ask())
        seeds = {world.cluster.submitted.get_nowait().sampling.seed for _ in range(2)}
    assert len(seeds) == 2


async def test_stop_string_cuts_the_answer_and_frees_the_work() -> None:
    async with gateway_world() as world, asyncio.TaskGroup() as group:
        answer = group.create_task(world.http.post(URL, json=ask(stop=["END", "never"])))
        task = await world.cluster.submitted.get()
        await world.cluster.say(task, "It is the END of it, really")
        choice = (await answer).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("It is the ", "stop")
        assert await world.cluster.cancelled.get() == task.task_id


async def test_logprobs_describe_the_tokens_of_the_text() -> None:
    async with gateway_world(says(TEXT)) as world:
        choice = (await world.http.post(URL, json=ask(logprobs=2, max_tokens=4))).json()["choices"][0]
        assert world.cluster.submitted.get_nowait().sampling.num_logprobs == 2
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"] == [-1.0] * 4
    assert logprobs["top_logprobs"][0] == {logprobs["tokens"][0]: -1.0, TOKENIZER.token_text(5): -2.0}
    assert logprobs["text_offset"][1] == len(logprobs["tokens"][0])


async def test_echo_with_logprobs_and_no_tokens_scores_a_text() -> None:
    text = "The quick brown fox"
    async with gateway_world(says("unused")) as world:
        fields = ask(prompt=text, max_tokens=0, echo=True, logprobs=0)
        body = (await world.http.post(URL, json=fields)).json()
    choice, ids = body["choices"][0], TOKENIZER.encode(text)
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    assert choice["logprobs"]["token_logprobs"] == [None] + [-1.0] * (len(ids) - 1)
    assert "".join(choice["logprobs"]["tokens"]) == text
    assert body["usage"]["completion_tokens"] == 0


async def test_echo_shows_the_prompt_before_the_answer() -> None:
    async with gateway_world(says(" and on")) as world:
        for prompt in ("On", TOKENIZER.encode("On")):
            choice = (await world.http.post(URL, json=ask(prompt=prompt, echo=True))).json()["choices"][0]
            assert choice["text"] == "On and on"


@pytest.mark.parametrize(("stream", "told"), [(False, f"{VERSION}-{VERSION + 2}"), (True, f"{VERSION}")])
async def test_the_versions_of_the_first_and_the_last_token_are_told(stream: bool, told: str) -> None:
    async with gateway_world() as world, asyncio.TaskGroup() as group:
        asking = group.create_task(world.http.post(URL, json=ask(stream=stream)))
        task = await world.cluster.submitted.get()
        await world.cluster.say(task, "one")
        world.cluster.version += 2
        end = SequenceResult(
            task_id=task.task_id,
            token=TokenLogprob(token=EOS),
            index=world.cluster.num_said[task.task_id],
            finish="stop",
        )
        await world.cluster.produce(task, end)
        response = await asking
    assert response.headers["lemix-weights-version"] == told
    last = events_of(response.text)[-1] if stream else response.json()
    assert last["system_fingerprint"] == f"weights-{VERSION}-{VERSION + 2}"
    (first_range, last_range) = last["choices"][0]["lemix"]["versions"]
    assert (first_range["version"], last_range["version"]) == (VERSION, VERSION + 2)
    assert first_range["first_token"] == 0
    assert last_range["first_token"] == first_range["last_token"] + 1


# Streams


async def test_stream_gives_the_same_text_piece_by_piece() -> None:
    fields = ask(n=2, stream=True, stream_options={"include_usage": True})
    async with gateway_world(says(TEXT)) as world:
        response = await world.http.post(URL, json=fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events_of(response.text)
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    for index in range(2):
        choices = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in choices) == TEXT
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
        assert len(choices) > 5
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2 * (len(TOKENIZER.encode(TEXT)) + 1)
    assert {event["system_fingerprint"] for event in (*chunks, last)} == {f"weights-{VERSION}-{VERSION}"}
    assert len({event["id"] for event in (*chunks, last)}) == 1


async def test_each_token_is_shown_before_the_next_is_made() -> None:
    async with gateway_world() as world, served(world) as address, asyncio.TaskGroup() as group:
        lines: asyncio.Queue[str] = asyncio.Queue()
        reader = group.create_task(read_stream(address, lines))
        task = await world.cluster.submitted.get()
        for word in ("one", " two", " three"):
            await world.cluster.say(task, word)
            assert json.loads((await lines.get()).removeprefix("data: "))["choices"][0]["text"] == word
        reader.cancel()


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (URL, ask()),
        ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "Say it"}]}),
        ("/v1/responses", {"model": MODEL, "input": "Say it"}),
    ],
)
def test_a_silent_stream_begins_when_its_node_has_taken_it_and_says_that_it_is_alive(
    url: str, body: dict[str, Any]
) -> None:
    async def asked() -> httpx.Response:
        async with gateway_world(ping_every_s=4.0) as world, asyncio.TaskGroup() as group:
            answer = group.create_task(world.http.post(url, json=body | {"stream": True}))
            task = await world.cluster.submitted.get()
            await asyncio.sleep(10 * world.settings.ping_every_s / 4)
            await world.cluster.produce(task, *says(" and")(task))
        return await answer

    response = run_virtual(asked())
    assert (response.status_code, "lemix-weights-version" in response.headers) == (200, False)
    before, pings, after = response.text.partition(": ping\n\n" * 2)
    assert '" and"' not in before
    assert pings
    assert '" and"' in after
    assert ": ping" not in after


def test_a_stream_in_line_begins_before_it_has_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.cluster_client.SUBMIT_TIMEOUT_S", 100.0)

    async def asked() -> httpx.Response:
        async with gateway_world(ping_every_s=4.0) as world, asyncio.TaskGroup() as group:
            world.cluster.gate.clear()
            answer = group.create_task(world.http.post(URL, json=ask(stream=True)))
            task = await world.cluster.submitted.get()
            await asyncio.sleep(IN_LINE_AFTER_S + REFUSALS_WITHIN_S + 3 * world.settings.ping_every_s)
            world.cluster.gate.set()
            await world.cluster.produce(task, *says(" and")(task))
        return await answer

    response = run_virtual(asked())
    assert response.text.startswith(": ping\n\n" * 2)
    assert '" and"' in response.text


def test_a_refusal_soon_after_the_placement_has_a_status_even_for_a_stream() -> None:
    async def asked() -> httpx.Response:
        async with gateway_world() as world, asyncio.TaskGroup() as group:
            answer = group.create_task(world.http.post(URL, json=ask(stream=True)))
            task = await world.cluster.submitted.get()
            await asyncio.sleep(REFUSALS_WITHIN_S / 2)
            await world.cluster.fail(task, 429, "the queue is full")
        return await answer

    assert run_virtual(asked()).status_code == 429


async def test_stream_without_usage_has_no_usage_field() -> None:
    async with gateway_world(says("hi")) as world:
        events = events_of((await world.http.post(URL, json=ask(stream=True))).text)
    assert all("usage" not in event for event in events)


async def test_streamed_logprobs_and_echo_add_up_to_the_whole_answer() -> None:
    fields = ask(prompt="Do it", echo=True, logprobs=1, stop=["The end"])
    async with gateway_world(says(TEXT)) as world:
        whole = (await world.http.post(URL, json=fields)).json()["choices"][0]
        events = events_of((await world.http.post(URL, json=fields | {"stream": True})).text)
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [item for choice in choices for item in choice["logprobs"][name]] == values


async def test_failure_in_a_stream_is_its_last_event() -> None:
    async with gateway_world() as world, asyncio.TaskGroup() as group:
        answer = group.create_task(world.http.post(URL, json=ask(stream=True)))
        task = await world.cluster.submitted.get()
        await world.cluster.say(task, "It was")
        await world.cluster.fail(task, 500, "the node was lost")
        lines = [line for line in (await answer).text.split("\n\n") if line]
    assert json.loads(lines[-1].removeprefix("data: ")) == {
        "error": {"message": "the node was lost", "type": "server_error", "param": None, "code": None}
    }


async def test_failure_before_the_first_token_has_a_status_even_for_a_stream() -> None:
    async with gateway_world() as world, asyncio.TaskGroup() as group:
        answer = group.create_task(world.http.post(URL, json=ask(stream=True)))
        for _ in range(MAX_TRIES):
            task = await world.cluster.submitted.get()
            await world.cluster.fail(task, 503, "no node is ready")
        response = await answer
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert error_of(response)["message"] == "no node is ready"


# Errors


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "gpt-4"}, 404, "model", "model_not_found"),
        ({"prompt": [1] * 2000}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": [CARD.vocab_size]}, 400, "prompt", "invalid_value"),
        ({"max_tokens": "many"}, 400, "max_tokens", "invalid_value"),
        ({"suffix": "end"}, 400, "suffix", "invalid_value"),
        ({"temprature": 1}, 400, "temprature", "unsupported_parameter"),
    ],
)
async def test_bad_request_is_refused_and_the_next_is_served(
    fields: dict[str, Any], status: int, param: str, code: str
) -> None:
    async with gateway_world(says("fine")) as world:
        refused = await world.http.post(URL, json=ask(**fields))
        served_next = await world.http.post(URL, json=ask())
    error = error_of(refused)
    assert (refused.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert served_next.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "metadata": {"a": -Infinity}}',
        b'{"prompt":' + b"[" * 100_000 + b"}",
    ],
)
async def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    async with gateway_world() as world:
        response = await world.http.post(URL, content=body, headers=JSON)
    assert response.status_code == 400
    assert "JSON" in error_of(response)["message"]


async def unannounced() -> AsyncIterator[bytes]:
    for _ in range(3):
        yield b" " * 2000


@pytest.mark.parametrize("body", [b" " * 5000, None])
async def test_oversize_body_is_refused_whether_announced_or_not(body: bytes | None) -> None:
    async with gateway_world(max_body_bytes=4096) as world:
        response = await world.http.post(URL, content=unannounced() if body is None else body)
    assert response.status_code == 413
    assert "4096" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", URL, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/x/y", 404),
    ],
)
async def test_unknown_route_and_wrong_method(method: str, path: str, status: int) -> None:
    async with gateway_world() as world:
        response = await world.http.request(method, path)
    assert response.status_code == status
    error_of(response)


async def test_without_a_scheduler_there_is_no_answer() -> None:
    async with gateway_world(with_cluster=False) as world:
        response = await world.http.post(URL, json=ask())
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "scheduler" in error_of(response)["message"]


def test_old_request_ends_with_one_error_and_its_work_is_freed() -> None:
    async def told() -> None:
        async with gateway_world(request_timeout_s=0.05) as world:
            response = await world.http.post(URL, json=ask())
            task = world.cluster.submitted.get_nowait()
            assert await world.cluster.cancelled.get() == task.task_id
        assert response.status_code == 504
        assert "0.05 s" in error_of(response)["message"]

    run_virtual(told())


async def test_requests_beyond_the_limit_are_refused_until_one_ends() -> None:
    async with gateway_world(max_concurrent_requests=1) as world, asyncio.TaskGroup() as group:
        first = group.create_task(world.http.post(URL, json=ask()))
        task = await world.cluster.submitted.get()
        refused = await world.http.post(URL, json=ask())
        await world.cluster.produce(task, *says("done")(task))
        assert (await first).status_code == 200
        world.cluster.script = says("next")
        assert (await world.http.post(URL, json=ask())).status_code == 200
    assert (refused.status_code, error_of(refused)["type"]) == (429, "rate_limit_error")


def test_a_node_that_works_for_nobody_is_told_to_stop() -> None:
    """As after a lost answer of the scheduler: the gateway has given up and never knew the node."""

    async def told() -> None:
        async with gateway_world(request_timeout_s=0.05) as world:
            world.cluster.gate.clear()
            response = await world.http.post(URL, json=ask())
            task = world.cluster.submitted.get_nowait()
            assert world.cluster.cancelled.empty()
            await world.cluster.say(task, "x")
            assert await world.cluster.cancelled.get() == task.task_id
            world.cluster.gate.set()
        assert response.status_code == 504

    run_virtual(told())


async def test_one_failed_choice_fails_the_answer_and_frees_the_others() -> None:
    async with gateway_world() as world, asyncio.TaskGroup() as group:
        answer = group.create_task(world.http.post(URL, json=ask(n=2)))
        failing, other = [await world.cluster.submitted.get() for _ in range(2)]
        await world.cluster.fail(failing, 500, "out of memory")
        assert (await answer).status_code == 500
        cancelled = {await world.cluster.cancelled.get() for _ in range(2)}
        assert cancelled == {failing.task_id, other.task_id}, "who failed it is not known: both are freed"
        assert world.cluster.cancelled.empty()


@pytest.mark.parametrize("max_tokens", [6, 100], ids=["length", "stop"])
async def test_lost_tokens_are_an_error(max_tokens: int) -> None:
    async with gateway_world(lambda task: says(TEXT)(task)[:2] + says(TEXT)(task)[3:]) as world:
        response = await world.http.post(URL, json=ask(max_tokens=max_tokens))
    assert response.status_code == 502
    assert "lost" in error_of(response)["message"]


async def test_tokens_that_come_twice_count_once() -> None:
    async with gateway_world(lambda task: [r for r in says(TEXT)(task) for _ in range(2)]) as world:
        response = await world.http.post(URL, json=ask(max_tokens=6))
    assert response.json()["choices"][0]["text"] == TOKENIZER.decode(TOKENIZER.encode(TEXT)[:6])
    assert response.json()["usage"]["completion_tokens"] == 6


# Clients that go away


@pytest.mark.parametrize("stream", [True, False])
async def test_client_that_leaves_frees_its_work(stream: bool) -> None:
    async with (
        gateway_world() as world,
        served(world) as address,
        httpx.AsyncClient(base_url=address) as http,
    ):
        client = asyncio.create_task(http.post(address + URL, json=ask(n=2, stream=stream)))
        tasks = [await world.cluster.submitted.get() for _ in range(2)]
        client.cancel()
        cancelled = {await world.cluster.cancelled.get() for _ in tasks}
    assert cancelled == {task.task_id for task in tasks}


async def test_client_that_leaves_in_the_middle_of_a_stream_frees_its_work() -> None:
    async with gateway_world() as world, served(world) as address:
        lines: asyncio.Queue[str] = asyncio.Queue()
        reader = asyncio.create_task(read_stream(address, lines))
        task = await world.cluster.submitted.get()
        await world.cluster.say(task, "Once")
        await lines.get()
        reader.cancel()
        assert await world.cluster.cancelled.get() == task.task_id
        metrics = (await world.http.get("/metrics")).text
    assert 'lemix_requests_total{outcome="cancelled"} 1.0' in metrics


async def test_work_placed_after_the_client_left_is_freed() -> None:
    async with (
        gateway_world() as world,
        served(world) as address,
        httpx.AsyncClient(base_url=address) as http,
    ):
        world.cluster.gate.clear()
        client = asyncio.create_task(http.post(address + URL, json=ask()))
        task = await world.cluster.submitted.get()
        client.cancel()
        while "lemix_requests_running 0.0" not in (await world.http.get("/metrics")).text:
            pass
        world.cluster.gate.set()
        assert await world.cluster.cancelled.get() == task.task_id


async def test_shutdown_ends_open_requests_with_an_error() -> None:
    async with gateway_world() as world:
        async with httpx.AsyncClient() as http:
            async with served(world) as address:
                answer = asyncio.create_task(http.post(address + URL, json=ask()))
                task = await world.cluster.submitted.get()
                await world.http.get("/metrics")  # a round trip, after which the task is placed
            response = await answer
        assert await world.cluster.cancelled.get() == task.task_id
    assert response.status_code == 503
    assert "shutting down" in error_of(response)["message"]


# Models, health, metrics, traces


async def test_models_are_listed() -> None:
    async with gateway_world() as world:
        listed = (await world.http.get("/v1/models")).json()
        shown = (await world.http.get(f"/v1/models/{MODEL}")).json()
    assert listed == {"object": "list", "data": [shown]}
    assert (shown["id"], shown["object"]) == (MODEL, "model")
    assert shown["max_model_len"] == CARD.context_length


async def test_health_sends_one_token_through_a_node() -> None:
    async with gateway_world(says("x")) as world:
        responses = await asyncio.gather(*(world.http.get("/health") for _ in range(5)))
        task = world.cluster.submitted.get_nowait()
        assert world.cluster.submitted.empty()
    assert task.sampling.max_tokens == 1
    patience_s = world.settings.health_timeout_s
    assert task.objective == Objective(ttft_s=patience_s, tbt_s=patience_s, when_late="serve_last")
    assert {response.status_code for response in responses} == {200}
    assert responses[0].json()["status"] == "ok"
    assert responses[0].json()["weights_version"] == VERSION


def test_health_fails_when_no_token_comes() -> None:
    async def told() -> None:
        async with gateway_world(health_timeout_s=0.05) as world:
            response = await world.http.get("/health")
            assert await world.cluster.cancelled.get() == world.cluster.submitted.get_nowait().task_id
        assert response.status_code == 503
        assert "no token within 0.05 s" in response.json()["reason"]

    run_virtual(told())


async def test_health_fails_without_a_scheduler() -> None:
    async with gateway_world(with_cluster=False) as world:
        response = await world.http.get("/health")
    assert response.status_code == 503


def test_a_cancel_that_fails_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """NATS may be away when a request is given up."""
    publish = MemoryBus.publish

    async def fails(bus: MemoryBus, subject: Subject[Any], message: Message, **options: str) -> None:
        if isinstance(message, CancelTask):
            raise BusError("NATS is away")
        await publish(bus, subject, message, **options)

    async def told() -> list[int]:
        async with gateway_world(request_timeout_s=0.05) as world:
            late = await world.http.post(URL, json=ask())
            return [late.status_code, (await world.http.get("/v1/models")).status_code]

    monkeypatch.setattr(MemoryBus, "publish", fails)
    assert run_virtual(told()) == [504, 200]


async def test_metrics_count_requests_and_show_the_cluster() -> None:
    async with gateway_world(says("one two")) as world:
        await world.http.post(URL, json=ask())
        await world.http.post(URL, json=ask(model="other"))
        text = (await world.http.get("/metrics")).text
    num_tokens = len(TOKENIZER.encode("one two")) + 1
    for line in (
        'lemix_requests_total{outcome="completed"} 1.0',
        'lemix_requests_total{outcome="refused"} 1.0',
        "lemix_requests_running 0.0",
        f"lemix_completion_tokens_total {num_tokens:.1f}",
        "lemix_ttft_seconds_count 1.0",
        f"lemix_tbt_seconds_count {num_tokens - 1:.1f}",
        "lemix_scheduler_up 1.0",
        "lemix_nodes_ready 1.0",
        f'lemix_stage_weights_version{{node="{NODE}",stage="1"}} {VERSION:.1f}',
        f'lemix_stage_kv_blocks_used{{node="{NODE}",stage="0"}} 11.0',
    ):
        assert line in text.splitlines()
    of_stage_1 = {line.partition("{")[0] for line in text.splitlines() if 'stage="1"' in line}
    assert of_stage_1 == {"lemix_stage_weights_version", "lemix_stage_queued"}, "the rest is the node's"


async def test_metrics_show_the_losses_of_what_serves_and_of_what_the_guard_judged_last() -> None:
    withheld = JudgedVersion(version=32, judged_wall_s=1.0, samples_loss=3.5, why_withheld="too high")
    node = NodeWeights(
        node=NODE,
        version=33,
        durable_version=32,
        published=16,
        held_out_loss=1.25,
        samples_loss=0.5,
        num_withheld=1,
        last_withheld=32,
        newest_judged=32,
        training_loss=2.25,
        judged=(withheld,),
        why_differing="version 16: far off",
    )

    async def answer(_: Incoming[WeightsRequest]) -> WeightsStatus:
        return WeightsStatus(nodes=(node,))

    async with gateway_world() as world:
        await world.cluster.bus.respond(NODE_WEIGHTS.at(), answer)
        text = (await world.http.get("/metrics")).text
    told = {line for line in text.splitlines() if line.startswith(("lemix_weights_", "lemix_trainer_up"))}
    assert told == {
        "lemix_trainer_up 1.0",
        f'lemix_weights_version{{node="{NODE}"}} 33.0',
        f'lemix_weights_durable_version{{node="{NODE}"}} 32.0',
        f'lemix_weights_published{{node="{NODE}"}} 16.0',
        f'lemix_weights_newest_judged{{node="{NODE}"}} 32.0',
        f'lemix_weights_num_withheld{{node="{NODE}"}} 1.0',
        f'lemix_weights_training_loss{{node="{NODE}"}} 2.25',
        f'lemix_weights_differ{{node="{NODE}"}} 1.0',
        f'lemix_weights_held_out_loss{{node="{NODE}",of="served"}} 1.25',
        f'lemix_weights_samples_loss{{node="{NODE}",of="served"}} 0.5',
        f'lemix_weights_samples_loss{{node="{NODE}",of="judged"}} 3.5',
    }


async def test_metrics_say_when_scheduler_and_trainer_are_gone() -> None:
    async with gateway_world(with_cluster=False) as world:
        lines = (await world.http.get("/metrics")).text.splitlines()
    assert {"lemix_scheduler_up 0.0", "lemix_trainer_up 0.0"} <= set(lines)
    assert not any(line.startswith("lemix_stage_weights_version{") for line in lines)


class KeptSpans(SpanExporter):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += spans
        return SpanExportResult.SUCCESS


async def test_trace_goes_on_from_the_client_to_the_cluster() -> None:
    kept, trace_id = KeptSpans(), "4bf92f3577b34da6a3ce929d0e0e4736"
    async with gateway_world(says("secret"), exporter=kept) as world:
        headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
        await world.http.post(URL, json=ask(prompt="private"), headers=headers)
        sent = world.cluster.traceparents
    [span] = [span for span in kept.spans if span.name == "gateway.completion"]
    assert f"{span.context.trace_id:032x}" == trace_id
    assert sent == [f"00-{trace_id}-{span.context.span_id:016x}-01"]
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.usage.output_tokens"] == len(TOKENIZER.encode("secret")) + 1
    assert "private" not in str(attributes)
    assert "secret" not in str(attributes)


# The official client


@asynccontextmanager
async def official_client(world: World) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        served(world) as address,
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_official_client_completes_streams_and_is_refused() -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": "Say it", "max_tokens": 40}
    streaming: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    async with gateway_world(says(TEXT)) as world, official_client(world) as client:
        whole = await client.completions.create(**fields, logprobs=1)
        chunks = [chunk async for chunk in await client.completions.create(**fields, **streaming)]
        models = [model.id async for model in client.models.list()]
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.completions.create(**fields | {"model": "gpt-4"})
        with pytest.raises(openai.BadRequestError, match="top_p"):
            await client.completions.create(**fields, top_p=3)
    assert whole.choices[0].text == TEXT
    assert whole.usage is not None
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-1].usage == whole.usage
    assert models == [MODEL]


async def test_official_client_is_told_of_a_failure_in_a_stream() -> None:
    async with gateway_world() as world, official_client(world) as client:
        answer = asyncio.create_task(client.completions.create(model=MODEL, prompt="a", stream=True))
        task = await world.cluster.submitted.get()
        await world.cluster.say(task, "It was")
        stream = await answer
        await world.cluster.fail(task, 500, "the node was lost")
        with pytest.raises(openai.APIError, match="the node was lost"):
            async for _ in stream:
                pass
