"""What probes, proxies and browsers expect of any server."""

import pytest

from tests.support.gateway import MODEL, World, gateway_world, says

ORIGIN = "https://chat.example"
ASKED = {"model": MODEL, "prompt": "Say it", "max_tokens": 4}


@pytest.mark.parametrize("path", ["/health", "/v1/models", f"/v1/models/{MODEL}", "/metrics"])
async def test_head_is_answered_like_get_without_the_body(path: str) -> None:
    async with gateway_world(says("x")) as world:
        asked = await world.http.get(path)
        head = await world.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == asked.headers["content-type"]


async def test_a_slash_at_the_end_changes_nothing() -> None:
    async with gateway_world(says("fine")) as world:
        listed = await world.http.get("/v1/models/")
        answer = await world.http.post("/v1/completions/", json=ASKED)
    assert listed.json()["data"][0]["id"] == MODEL
    assert answer.json()["choices"][0]["text"] == "fine"


@pytest.mark.parametrize("prefix", ["/llm", "llm/", "/a/b"])
async def test_a_proxy_may_pass_its_path_prefix_on_or_not(prefix: str) -> None:
    async with gateway_world(says("fine"), root_path=prefix) as world:
        for path in ("", "/" + prefix.strip("/")):
            for suffix in ("", "/"):
                assert (await world.http.get(f"{path}/v1/models{suffix}")).status_code == 200
            assert (await world.http.post(f"{path}/v1/completions", json=ASKED)).status_code == 200
            assert (await world.http.get(f"{path}/nowhere")).status_code == 404


async def preflight(world: World, origin: str) -> dict[str, str]:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    return dict((await world.http.options("/v1/completions", headers=headers)).headers)


async def test_pages_of_named_origins_may_use_the_api() -> None:
    async with gateway_world(says("fine"), cors_origins=f"{ORIGIN}, http://other.example") as world:
        allowed = await preflight(world, ORIGIN)
        stranger = await preflight(world, "https://evil.example")
        refused = await world.http.post("/v1/completions", json={}, headers={"origin": ORIGIN})
    assert allowed["access-control-allow-origin"] == ORIGIN
    assert "authorization" in allowed["access-control-allow-headers"].lower()
    assert "access-control-allow-origin" not in stranger
    assert refused.status_code == 400
    assert refused.headers["access-control-allow-origin"] == ORIGIN, "or the page could not read the error"


async def test_no_origin_is_allowed_unless_it_is_named() -> None:
    async with gateway_world() as world:
        assert "access-control-allow-origin" not in await preflight(world, ORIGIN)
