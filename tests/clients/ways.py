"""The four ways in which the official client asks: blocking or not, streamed or whole."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import openai

Told = list[tuple[str, str]]
"""Text and finish reason of each choice."""
MODEL = "embedded"
WAYS = ("whole", "stream", "async", "async stream")

_NO_RETRIES: dict[str, Any] = {"api_key": "none", "max_retries": 0}


def client_of(address: str, **options: Any) -> openai.OpenAI:
    """A blocking client that asks once."""
    return openai.OpenAI(base_url=f"{address}/v1", **_NO_RETRIES | options)


def async_client_of(address: str, **options: Any) -> openai.AsyncOpenAI:
    """A client for asyncio that asks once."""
    return openai.AsyncOpenAI(base_url=f"{address}/v1", **_NO_RETRIES | options)


def complete(client: openai.OpenAI, way: str = "whole", **arguments: Any) -> Told:
    """Ask for completions that way, where `client` asks."""
    return _ask(client, way, lambda client: client.completions, lambda choice: choice.text, arguments)


def chat(client: openai.OpenAI, way: str = "whole", **arguments: Any) -> Told:
    """Ask in a chat that way, where `client` asks."""
    return _ask(client, way, lambda client: client.chat.completions, _said, arguments)


def _said(choice: Any) -> str:
    return (choice.delta if hasattr(choice, "delta") else choice.message).content or ""


def _ask(
    client: openai.OpenAI,
    way: str,
    route: Callable[[Any], Any],
    text_of: Callable[[Any], str],
    arguments: dict[str, Any],
) -> Told:
    arguments = {"model": MODEL, **arguments, "stream": way.endswith("stream")}
    if way.startswith("async"):
        chunks = asyncio.run(_chunks(str(client.base_url).removesuffix("/v1/"), route, arguments))
    else:
        answer = route(client).create(**arguments)
        chunks = list(answer) if arguments["stream"] else [answer]
    return _put_together(chunks, text_of)


async def _chunks(address: str, route: Callable[[Any], Any], arguments: dict[str, Any]) -> list[Any]:
    async with async_client_of(address) as client:
        answer = await route(client).create(**arguments)
        return [chunk async for chunk in answer] if arguments["stream"] else [answer]


def _put_together(chunks: Iterable[Any], text_of: Callable[[Any], str]) -> Told:
    texts: dict[int, list[str]] = defaultdict(list)
    reasons: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index].append(text_of(choice))
            if choice.finish_reason is not None:
                assert choice.index not in reasons, "a choice ends once"
                reasons[choice.index] = choice.finish_reason
    return [("".join(texts[index]), reasons[index]) for index in sorted(texts)]
