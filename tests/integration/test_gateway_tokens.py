"""Tokenising over HTTP: what it says, what it refuses, and that nothing waits for it."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from shared.settings import EMBEDDED_MODEL
from shared.text import TextTokenizer
from tests.support.gateway import CARD, MODEL, TOKENIZER, gateway_world, says

LIBRARY = Tokenizer.from_file(str(Path(EMBEDDED_MODEL) / "tokenizer.json"))
LONG = "a word or two, " * 100
TALK = [{"role": "user", "content": "Who are you?"}]


class BlockedTokenizer(TextTokenizer):
    """Reads a long text only when the test says so."""

    def __init__(self) -> None:
        super().__init__(LIBRARY)
        self.begun, self.released = threading.Event(), threading.Event()

    def encode(self, text: str) -> list[int]:
        if text == LONG:
            self.begun.set()
            assert self.released.wait(timeout=20)
        return super().encode(text)


async def test_while_a_text_is_tokenised_streams_and_other_routes_go_on() -> None:
    tokenizer = BlockedTokenizer()
    async with gateway_world(says("All is well."), tokenizer=tokenizer) as world:
        body = {"model": MODEL, "prompt": LONG, "max_tokens": 20}
        blocked = asyncio.create_task(world.http.post("/v1/completions", json=body))
        await asyncio.to_thread(tokenizer.begun.wait, 20)

        assert (await world.http.get("/v1/models")).status_code == 200
        streamed = await world.http.post("/v1/completions", json=body | {"prompt": "Hi", "stream": True})
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert not blocked.done()

        tokenizer.released.set()
        assert (await blocked).json()["choices"][0]["text"] == "All is well."


async def test_more_texts_than_requests_may_run_are_not_queued() -> None:
    tokenizer = BlockedTokenizer()
    async with gateway_world(tokenizer=tokenizer, max_concurrent_requests=1) as world:
        blocked = asyncio.create_task(world.http.post("/tokenize", json={"prompt": LONG}))
        await asyncio.to_thread(tokenizer.begun.wait, 20)
        refused = await world.http.post("/tokenize", json={"prompt": LONG})
        tokenizer.released.set()
        assert (refused.status_code, (await blocked).status_code) == (429, 200)


class UntouchedTokenizer(TextTokenizer):
    """Must not be asked."""

    def encode(self, text: str) -> list[int]:
        raise AssertionError("it was too long to begin with")

    encode_part = encode


@pytest.mark.parametrize(
    ("url", "asked", "param"),
    [
        ("/v1/completions", {"prompt": "x" * 100_000, "max_tokens": 1}, "prompt"),
        ("/v1/completions", {"prompt": [1] * (CARD.context_length + 1), "max_tokens": 0}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 100_000}]}, "messages"),
    ],
)
async def test_what_is_too_long_in_any_case_is_refused_untokenised(
    url: str, asked: dict[str, Any], param: str
) -> None:
    async with gateway_world(tokenizer=UntouchedTokenizer(LIBRARY)) as world:
        refused = await world.http.post(url, json={"model": MODEL} | asked)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (400, param, "context_length_exceeded")


@pytest.mark.parametrize("text", ["naïve 漢字 😀!", LONG, "", "<|endoftext|>"])
async def test_a_text_becomes_tokens_and_comes_back(text: str) -> None:
    async with gateway_world() as world:
        tokens = (await world.http.post("/tokenize", json={"prompt": text})).json()
        back = (await world.http.post("/detokenize", json={"tokens": tokens["tokens"]})).json()
    expected = LIBRARY.encode(text).ids
    assert tokens == {"count": len(expected), "max_model_len": CARD.context_length, "tokens": expected}
    assert back == {"prompt": text}


async def test_a_conversation_has_the_tokens_that_chat_counts() -> None:
    async with gateway_world(says("Hi")) as world:
        asked = {"model": MODEL, "messages": TALK}
        usage = (await world.http.post("/v1/chat/completions", json=asked)).json()["usage"]
        counted = (await world.http.post("/tokenize", json=asked)).json()
        without = (await world.http.post("/tokenize", json=asked | {"add_generation_prompt": False})).json()
    assert counted["count"] == usage["prompt_tokens"]
    assert counted["tokens"][: without["count"]] == without["tokens"] != counted["tokens"]
    assert TOKENIZER.decode(without["tokens"], skip_special_tokens=False).count("Who are you?") == 1


async def test_a_conversation_has_the_tokens_of_its_templates_variables() -> None:
    source = "{{ 'one' if short else 'one two three' }}"
    async with gateway_world(template=source) as world:
        asked = {"messages": TALK, "chat_template_kwargs": {"short": True}}
        tokens = (await world.http.post("/tokenize", json=asked)).json()["tokens"]
    assert tokens == LIBRARY.encode("one").ids


@pytest.mark.parametrize(
    ("url", "asked", "status", "param"),
    [
        ("/tokenize", {}, 400, None),
        ("/tokenize", {"messages": TALK, "chat_template_kwargs": {"tools": []}}, 400, "chat_template_kwargs"),
        ("/tokenize", {"prompt": "a", "messages": TALK}, 400, None),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "colour": 1}, 400, "colour"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [CARD.vocab_size]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
    ],
)
async def test_what_cannot_be_tokenised_is_refused(
    url: str, asked: dict[str, Any], status: int, param: str | None
) -> None:
    async with gateway_world() as world:
        refused = await world.http.post(url, json=asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param)
