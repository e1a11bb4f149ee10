"""Each route with no key, a wrong one, one of the wrong scope; and the gateway without keys."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.routing import BaseRoute, Mount, Route

from services.gateway.access.key_file import add_key
from services.gateway.access.keys import SCOPES, Key, Scope, ServiceClass, digest_of, scope_of, token_of
from tests.support.gateway import MODEL, gateway_world, says

OPEN = {"/health", "/docs", "/openapi.json"}
ASKED = {"model": MODEL, "prompt": "Say it", "max_tokens": 4}


def make_key(
    run_dir: Path, *scopes: Scope, service_class: ServiceClass = "interactive", **limits: int
) -> str:
    """Adds a key to a run; returns it as its owner sends it."""
    key_id = f"{'-'.join(scopes)}".replace("-", "")
    token = token_of(key_id, "ab" * 32)
    key = Key(
        id=key_id,
        name="me",
        digest=digest_of(token),
        scopes=scopes,
        service_class=service_class,
        created_at=0,
        **limits,
    )
    add_key(run_dir / "keys.json", key)
    return token


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def calls_of(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Each method and path that the application answers."""
    for route in _flat(app.routes):
        path = re.sub(r"{[^}]*}", "x", route.path)
        for method in sorted(set(route.methods or ()) - {"HEAD"}):
            yield method, path


def _flat(routes: list[BaseRoute]) -> Iterator[Route]:
    for route in routes:
        if isinstance(route, Mount) and scope_of(route.path) is None:
            continue  # the files of the page of documentation
        if not isinstance(route, Route):
            raise AssertionError(f"how is {route} kept from strangers?")
        yield route


async def test_every_route_asks_for_a_key_of_the_right_scope(tmp_path: Path) -> None:
    tokens = {scope: make_key(tmp_path, scope) for scope in SCOPES}
    async with gateway_world(says("x"), run_dir=tmp_path) as world:
        calls = list(calls_of(world.app))
        assert len(calls) > 15
        for method, path in calls:
            needed = scope_of(path)
            assert (needed is None) == any(path == route or path.startswith(f"{route}/") for route in OPEN)
            if needed is None:
                continue
            for headers, status, challenge in (
                ({}, 401, "Bearer"),
                ({"authorization": "Basic abc"}, 401, "Bearer"),
                (bearer(token_of("infer", "cd" * 32)), 401, "invalid_token"),
                *((bearer(tokens[scope]), 403, needed) for scope in set(SCOPES) - {needed, "admin"}),
            ):
                response = await world.http.request(method, path, headers=headers)
                assert response.status_code == status, (method, path, headers)
                assert challenge in response.headers["www-authenticate"]
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            for scope in (needed, "admin"):
                response = await world.http.request(method, path, headers=bearer(tokens[scope]))
                assert response.status_code not in (401, 403), (method, path, scope)


async def test_a_path_that_is_not_there_is_not_told_of_to_strangers(tmp_path: Path) -> None:
    token = make_key(tmp_path, "admin")
    async with gateway_world(run_dir=tmp_path) as world:
        assert (await world.http.get("/secret")).status_code == 401
        assert (await world.http.get("/secret", headers=bearer(token))).status_code == 404


async def test_probes_need_no_key(tmp_path: Path) -> None:
    make_key(tmp_path, "infer")
    async with gateway_world(says("x"), run_dir=tmp_path) as world:
        for method in ("GET", "HEAD"):
            assert (await world.http.request(method, "/health")).status_code == 200


async def test_limits_are_told_and_kept(tmp_path: Path) -> None:
    limited = make_key(tmp_path, "infer", requests_per_minute=2, tokens_per_minute=1000)
    other = make_key(tmp_path, "admin")
    async with gateway_world(says("x"), run_dir=tmp_path) as world:
        answers = [
            await world.http.post("/v1/completions", json=ASKED, headers=bearer(limited)) for _ in range(3)
        ]
        unlimited = await world.http.post("/v1/completions", json=ASKED, headers=bearer(other))
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[1].headers["x-ratelimit-limit-requests"] == "2"
    assert answers[1].headers["x-ratelimit-remaining-requests"] == "0"
    used = answers[0].json()["usage"]["total_tokens"]
    assert 1000 - 2 * used <= int(answers[1].headers["x-ratelimit-remaining-tokens"]) < 1000
    assert 0 < int(answers[2].headers["retry-after"]) <= 30
    assert answers[2].headers["x-ratelimit-remaining-requests"] == "0"
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert unlimited.status_code == 200
    assert "x-ratelimit-limit-requests" not in unlimited.headers


async def test_errors_tell_the_limits_too(tmp_path: Path) -> None:
    headers = bearer(make_key(tmp_path, "admin", requests_per_minute=60))
    calls: list[tuple[str, str, dict[str, Any], int]] = [
        ("POST", "/v1/completions", {"json": ASKED | {"top_p": 7}}, 400),
        ("POST", "/v1/completions", {"json": ASKED | {"model": "other"}}, 404),
        ("GET", "/v1/completions", {}, 405),
        ("POST", "/v1/completions", {"content": b"x"}, 415),
        ("GET", "/broken", {}, 500),
    ]
    async with gateway_world(run_dir=tmp_path) as world:

        @world.app.get("/broken")
        async def broken() -> None:
            raise RuntimeError("a fault of the gateway's own")

        for method, path, fields, status in calls:
            answer = await world.http.request(method, path, headers=headers, **fields)
            assert (answer.status_code, answer.headers["x-ratelimit-limit-requests"]) == (status, "60")


async def test_a_prompt_beyond_the_tokens_that_are_left_waits(tmp_path: Path) -> None:
    token = make_key(tmp_path, "infer", tokens_per_minute=8)
    async with gateway_world(says("x y z"), run_dir=tmp_path) as world:
        answers = [
            await world.http.post("/v1/completions", json=ASKED, headers=bearer(token)) for _ in range(3)
        ]
    assert answers[0].status_code == 200
    assert answers[-1].status_code == 429
    assert "8 tokens a minute" in answers[-1].json()["error"]["message"]


# Without keys


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:8000"}, 403),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}, 200),
        ({"host": "127.0.0.1:8000", "origin": "http://evil.example"}, 403),
        ({"host": "127.0.0.1:8000", "origin": "null"}, 403),
        ({"host": "127.0.0.1:8000", "origin": "https://chat.example"}, 200),
        ({"content-type": "text/plain"}, 415),
    ],
)
async def test_without_keys_pages_of_other_sites_get_nowhere(headers: dict[str, str], status: int) -> None:
    fields: dict[str, Any] = {"json": ASKED, "headers": headers}
    async with gateway_world(says("x"), cors_origins="https://chat.example") as world:
        response = await world.http.post("/v1/completions", **fields)
        assert world.cluster.submitted.empty() == (status != 200)
    assert response.status_code == status


async def test_an_insecure_gateway_answers_to_any_name_but_not_to_other_sites() -> None:
    async with gateway_world(says("x"), host="0.0.0.0", insecure=True) as world:
        by_name = await world.http.get("/v1/models", headers={"host": "gpu.example"})
        by_page = await world.http.get(
            "/v1/models", headers={"host": "gpu.example", "origin": "http://evil.example"}
        )
    assert (by_name.status_code, by_page.status_code) == (200, 403)


async def test_an_insecure_gateway_may_name_its_hosts() -> None:
    async with gateway_world(host="0.0.0.0", insecure=True, trusted_hosts="gpu.example") as world:
        answers = [
            await world.http.get("/v1/models", headers={"host": host})
            for host in ("gpu.example:8000", "127.0.0.1:8000", "evil.example")
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 403]


async def test_keys_that_are_gone_let_nobody_in(tmp_path: Path) -> None:
    async with gateway_world(host="0.0.0.0", run_dir=tmp_path) as world:
        assert (await world.http.get("/v1/models")).status_code == 401
