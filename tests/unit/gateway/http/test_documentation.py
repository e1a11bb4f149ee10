"""The OpenAPI document against the application, and the page that shows it."""

import asyncio
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.gateway.access.keys import scope_of
from tests.support.gateway import gateway_world, says, served
from tests.unit.gateway.http.test_auth import bearer, make_key

EXAMPLES_OF_A_ROUTE = 10
"""Drawn at random, beside those that schemathesis makes of every keyword of the document."""


@pytest.mark.parametrize(
    "routes", ["completions|responses", "files|fine_tuning|models|health|metrics|kenize"]
)
async def test_schemathesis_finds_nothing(tmp_path: Path, routes: str) -> None:
    """But for one of its checks: what a document allows is not always to be had.

    It cannot say which models and files there are, nor that one parameter rules out another.
    """
    key = bearer(make_key(tmp_path, "admin"))["authorization"]
    async with (
        gateway_world(says("fine"), run_dir=tmp_path, deadline_s=400) as world,
        served(world) as address,
    ):
        tool = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"),
            *("--header", f"Authorization: {key}", "--include-path-regex", routes),
            *("--phases", "examples,coverage,fuzzing", "--exclude-checks", "positive_data_acceptance"),
            *("--max-examples", str(EXAMPLES_OF_A_ROUTE), "--seed", "1", "--no-color"),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await tool.communicate()
    assert tool.returncode == 0, output.decode()


def references(part: Any) -> Iterator[str]:
    """Every `$ref` of a document."""
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for inner in part.values():
            yield from references(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from references(inner)


async def test_the_document_refers_to_nothing_that_is_not_there() -> None:
    async with gateway_world() as world:
        document = (await world.http.get("/openapi.json")).json()
    found = set(references(document))
    schemas = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert found
    assert found <= schemas


async def test_every_answer_is_described_and_every_key_is_asked_for() -> None:
    async with gateway_world() as world:
        document = (await world.http.get("/openapi.json")).json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == (scope_of(path) is not None)
            for status, answer in operation["responses"].items():
                for media_type, described in answer["content"].items():
                    assert described["schema"], (path, status, media_type)


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_the_page_is_whole_without_internet(prefix: str) -> None:
    async with gateway_world(root_path=prefix) as world:
        page = (await world.http.get("/docs")).text
        needed = re.findall(r"""(?:href|src)="([^"]+)"|url: '([^']+)'""", page)
        for path in (link or url for link, url in needed):
            assert path.startswith(f"{prefix}/")
            for asked in (path, path.removeprefix(prefix)):  # through a proxy that strips the prefix, too
                assert (await world.http.get(asked)).status_code == 200
    assert len(needed) == 4
