"""A node's answers against `generate()` of transformers, for every family and number of stages."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import FAMILIES, VOCAB_SIZE, save_tiny_model
from tests.support.node import Node, running_node
from tests.support.reference import greedy_reference

PROMPT_LENGTHS = (1, 3, 17, 40, 9, 26)
MAX_TOKENS = 12
SMALL_ITERATIONS: dict[str, Any] = {"max_iteration_tokens": 24, "kv_tokens": 512}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


async def ask_all(node: Node) -> list[Any]:
    return await asyncio.gather(
        *(node.complete(p, max_tokens=MAX_TOKENS, num_logprobs=2, prompt_logprobs=True) for p in prompts())
    )


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_tokens_and_logprobs_equal_transformers(
    family: str, num_stages: int, tmp_path: Path
) -> None:
    model = save_tiny_model(family, tmp_path / "model")
    async with running_node(tmp_path / "model", num_stages, tmp_path, **SMALL_ITERATIONS) as node:
        answers = await ask_all(node)
    for prompt, answer in zip(prompts(), answers, strict=True):
        tokens, logprobs = greedy_reference(model, prompt, MAX_TOKENS)
        assert answer.token_ids == tokens
        told = [token.logprob for token in (*answer.prompt, *answer.tokens)]
        assert told == pytest.approx(logprobs, abs=1e-4)
        assert answer.finish == "length"
