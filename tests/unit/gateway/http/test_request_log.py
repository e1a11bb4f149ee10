"""A request is found again by its id: in the answer, in the log, in its span; its failure too."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from services.gateway.http.request_log import show_request_ids
from shared.telemetry import JsonLinesExporter
from tests.support.gateway import MODEL, World, gateway_world, says

URL = "/v1/completions"
ASKED = {"model": MODEL, "prompt": "Say it", "max_tokens": 4}


@pytest.mark.parametrize("asked", ["abc-123", "x" * 128])
async def test_a_clients_id_comes_back(asked: str) -> None:
    async with gateway_world(says("fine")) as world:
        for method, path in (("POST", URL), ("GET", "/v1/models"), ("GET", "/nowhere"), ("PUT", "/health")):
            response = await world.http.request(method, path, json=ASKED, headers={"x-request-id": asked})
            assert response.headers["x-request-id"] == asked


@pytest.mark.parametrize("asked", ["", "x" * 129, "two words", "na\xefve", "line\tbreak"])
async def test_an_id_that_is_not_sane_is_replaced_by_a_new_one(asked: str) -> None:
    async with gateway_world() as world:
        ids = {
            (await world.http.get("/v1/models", headers={b"x-request-id": asked.encode("latin-1")})).headers[
                "x-request-id"
            ]
            for _ in range(2)
        }
    assert asked not in ids
    assert len(ids) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("url", "asked"),
    [
        (URL, ASKED),
        ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "Say it"}]}),
        ("/v1/responses", {"model": MODEL, "input": "Say it"}),
    ],
)
async def test_the_trace_is_found_from_the_request_id_and_from_the_answers_id(
    tmp_path: Path, url: str, asked: dict[str, Any], stream: bool
) -> None:
    exporter = JsonLinesExporter(tmp_path / "spans.jsonl")
    async with gateway_world(says("fine"), exporter=exporter) as world:
        body = asked | {"stream": stream}
        answer = await world.http.post(url, json=body, headers={"x-request-id": "mine"})
        await world.http.post(url, json=body | {"top_p": 7}, headers={"x-request-id": "refused"})
    spans = [json.loads(line) for line in (tmp_path / "spans.jsonl").read_text().splitlines()]
    requests = {
        span["attributes"]["lemix.request_id"]: span for span in spans if span["name"] == "gateway.request"
    }
    [completion] = [span for span in spans if span["name"] == "gateway.completion"]
    assert requests["mine"]["span_id"] == completion["parent_span_id"]
    assert f'"id":"{completion["attributes"]["gen_ai.response.id"]}"' in answer.text
    statuses = {name: span["attributes"]["http.response.status_code"] for name, span in requests.items()}
    assert statuses == {"mine": 200, "refused": 400}


def break_models(world: World) -> None:
    @world.app.get("/broken")
    async def broken() -> Any:
        raise RuntimeError("a fault of the gateway's own")


async def test_a_failure_is_an_answer_with_an_id_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with gateway_world() as world:
        break_models(world)
        response = await world.http.get("/broken", headers={"x-request-id": "mine"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "mine")
    assert response.json()["error"]["type"] == "server_error"
    assert "a fault of the gateway's own" in caplog.text


async def test_a_path_cannot_write_lines_of_its_own_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with gateway_world() as world:
        with caplog.at_level(logging.INFO, "services.gateway"):
            await world.http.get("/v1/models%0AERROR%20forged")
    [line] = [record.getMessage() for record in caplog.records if record.name.startswith("services.gateway")]
    assert line == "GET /v1/models%0AERROR%20forged: 404"


async def test_log_lines_begin_with_the_request_id(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    root, handler = logging.getLogger(), logging.StreamHandler()
    root.addHandler(handler)
    before = {kept: list(kept.filters) for kept in root.handlers}
    try:
        show_request_ids()
        with caplog.at_level(logging.INFO):
            async with gateway_world() as world:
                await world.http.get("/v1/models", headers={"x-request-id": "100%"})
    finally:
        root.removeHandler(handler)
        for kept, filters in before.items():
            kept.filters = filters
    assert "[100%] GET /v1/models: 200" in capsys.readouterr().err
