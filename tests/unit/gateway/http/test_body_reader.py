"""Bodies as clients send them: compressed, marked, late, too many at once, of another type."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from backports import zstd

from lemix.simulation.loop import run_virtual
from tests.support.gateway import MODEL, gateway_world, says

URL = "/v1/completions"
JSON = {"content-type": "application/json"}
ASKED = json.dumps({"model": MODEL, "prompt": "Say it", "max_tokens": 4}).encode()


async def never_whole(begun: asyncio.Event | None = None) -> AsyncIterator[bytes]:
    yield b"{"
    if begun is not None:
        begun.set()
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"content-encoding": "gzip"}, gzip.compress(ASKED)),
        ({"content-encoding": "zstd"}, zstd.compress(ASKED)),
        ({}, b"\xef\xbb\xbf" + ASKED),
        ({"content-encoding": "gzip"}, gzip.compress(b"\xef\xbb\xbf" + ASKED)),
        ({"content-type": "application/json; charset=utf-8"}, ASKED),
    ],
    ids=["gzip", "zstd", "utf-8 mark", "gzip and mark", "charset"],
)
async def test_a_request_is_read_however_it_was_packed(headers: dict[str, str], body: bytes) -> None:
    async with gateway_world(says("fine")) as world:
        response = await world.http.post(URL, content=body, headers=JSON | headers)
    assert response.json()["choices"][0]["text"] == "fine"


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-encoding": "br"}, ASKED, 415),
        ({"content-encoding": "gzip"}, gzip.compress(b" " * 5000), 413),
        ({"content-encoding": "gzip"}, ASKED, 400),
        ({"content-type": "text/plain"}, ASKED, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, ASKED, 415),
        ({"content-type": ""}, ASKED, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, ASKED, 415),
    ],
    ids=["brotli", "bomb", "no gzip", "text", "form", "no type", "upload"],
)
async def test_other_bodies_are_refused_before_anything_is_done(
    headers: dict[str, str], body: bytes, status: int
) -> None:
    async with gateway_world(says("fine"), max_body_bytes=4096) as world:
        response = await world.http.post(URL, content=body, headers=JSON | headers)
        assert world.cluster.submitted.empty()
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_an_upload_is_taken_as_it_is_or_not_at_all() -> None:
    upload: dict[str, Any] = {
        "files": {"file": ("a.jsonl", b'{"text": "x"}\n')},
        "data": {"purpose": "fine-tune"},
    }
    async with gateway_world() as world:
        taken = await world.http.post("/v1/files", **upload)
        refused = await world.http.post("/v1/files", **upload, headers={"content-encoding": "gzip"})
        no_form = await world.http.post("/v1/files", json={})
    assert [taken.status_code, refused.status_code, no_form.status_code] == [200, 415, 415]


def test_a_body_that_does_not_come_is_given_up() -> None:
    async def asked() -> httpx.Response:
        async with gateway_world(body_timeout_s=5.0) as world:
            return await world.http.post(URL, content=never_whole(), headers=JSON)

    response = run_virtual(asked())
    assert (response.status_code, response.headers["connection"]) == (408, "close")
    assert "5 s" in response.json()["error"]["message"]


async def test_a_request_counts_from_the_first_byte_of_its_body() -> None:
    async with gateway_world(says("fine"), max_concurrent_requests=1) as world:
        begun = asyncio.Event()
        slow = asyncio.create_task(world.http.post(URL, content=never_whole(begun), headers=JSON))
        await begun.wait()
        refused = await world.http.post(URL, content=ASKED, headers=JSON)
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        served = await world.http.post(URL, content=ASKED, headers=JSON)
    assert (refused.status_code, refused.headers["retry-after"], served.status_code) == (429, "1", 200)
