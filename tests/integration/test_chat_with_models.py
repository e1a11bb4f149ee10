"""Greedy answers of the chat API against transformers: `apply_chat_template` and `generate()`.

The gateway and the stages are the real ones; only the scheduler is not: it has one node.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from shared.bus.base import Bus, Incoming
from shared.bus.memory import MemoryBroker
from shared.messages.inference import InferenceTask, Placed
from shared.subjects import ASSIGN, SUBMIT
from tests.support import chat_templates
from tests.support.gateway import MODEL, gateway_world
from tests.support.models import FAMILIES, save_tiny_model
from tests.support.node import running_node
from tests.support.reference import greedy_reference
from tests.support.tiny_tokenizer import save_tiny_tokenizer

MAX_TOKENS = 12
TEMPLATES = {
    "llama": chat_templates.LLAMA_3,
    "llama_tied": chat_templates.WITH_GENERATION,
    "qwen2": chat_templates.QWEN,
    "mistral": chat_templates.MISTRAL,
    "gpt2": chat_templates.CHATML,
    "gpt_neox": chat_templates.GEMMA,
}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, who are you?"},
    {"role": "assistant", "content": "A tiny model."},
    {"role": "user", "content": "What time is it?"},
]


async def schedule_on_node_0(bus: Bus) -> None:
    async def place(incoming: Incoming[InferenceTask]) -> Placed:
        await bus.publish(ASSIGN.at(node=0), incoming.message)
        return Placed(node=0)

    await bus.respond(SUBMIT.at(), place)


@asynccontextmanager
async def running_model(folder: Path, run_dir: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway in front of a node of two stages that runs the model in `folder`."""
    broker = MemoryBroker()
    async with running_node(folder, 2, run_dir, broker=broker):
        bus = broker.connect()
        await schedule_on_node_0(bus)
        async with gateway_world(broker=broker, model=folder, with_cluster=False) as world:
            yield world.http
        await bus.close()


async def answered(http: httpx.AsyncClient, *, stream: bool, **fields: Any) -> str:
    """The text of a greedy answer."""
    body = {"model": MODEL, "messages": CHAT, "temperature": 0, "max_tokens": MAX_TOKENS, **fields}
    response = await http.post("/v1/chat/completions", json=body | {"stream": stream})
    assert response.status_code == 200, response.text
    if not stream:
        return str(response.json()["choices"][0]["message"]["content"])
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def by_transformers(model: Any, folder: Path, tools: Any = None) -> str:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(CHAT, tools=tools, add_generation_prompt=True, return_dict=False)
    tokens, _ = greedy_reference(model, prompt, MAX_TOKENS)
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_chat_equals_transformers(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save_tiny_model(family, folder)
    save_tiny_tokenizer(folder, TEMPLATES[family])

    async with running_model(folder, tmp_path) as http:
        texts = [await answered(http, stream=stream) for stream in (False, True)]
        with_tools = await answered(http, stream=False, tools=TOOLS)

    assert texts == [by_transformers(model, folder)] * 2
    assert with_tools == by_transformers(model, folder, TOOLS)
