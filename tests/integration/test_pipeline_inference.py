"""A node's answers against `generate()` of transformers, for every family and number of stages.

Each is asked twice: of a node that only serves, and of one that trains at learning rate 0 at the same time.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from shared.messages.training import BatchStepped
from tests.support.models import FAMILIES, VOCAB_SIZE, save_tiny_model
from tests.support.node import Node, running_node
from tests.support.reference import greedy_reference
from tests.support.training import messages, random_batches

PROMPT_LENGTHS = (1, 3, 17, 40, 9, 26)
MAX_TOKENS = 12
SMALL_ITERATIONS: dict[str, Any] = {
    "max_iteration_tokens": 24,
    "kv_tokens": 512,
    "training_patience_s": 0.0,  # training never waits for the answers
}


class Family(NamedTuple):
    """A model and what transformers answers with it: tokens and log-probabilities for each prompt."""

    folder: Path
    expected: list[tuple[list[int], list[float]]]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


async def ask_all(node: Node) -> list[Any]:
    return await asyncio.gather(
        *(node.complete(p, max_tokens=MAX_TOKENS, num_logprobs=2, prompt_logprobs=True) for p in prompts())
    )


async def train_for_ever(node: Node) -> None:
    (batch,) = random_batches(1, 2)
    node.learning_rate = 0.0
    for number in range(1_000_000):
        for message in messages(f"b{number}", batch):
            await node.feed(message)
        await node.next(BatchStepped)


@asynccontextmanager
async def training(node: Node) -> AsyncIterator[None]:
    """The node trains, with weights that stay as they are, while the block runs."""
    await node.restore()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(train_for_ever(node))
        yield
        task.cancel()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """One of them, with its answers computed once for all numbers of stages."""
    folder = tmp_path_factory.mktemp("model")
    model = save_tiny_model(request.param, folder)
    return Family(folder, [greedy_reference(model, prompt, MAX_TOKENS) for prompt in prompts()])


def assert_answers(answers: list[Any], expected: list[tuple[list[int], list[float]]]) -> None:
    for answer, (tokens, logprobs) in zip(answers, expected, strict=True):
        assert answer.token_ids == tokens
        told = [token.logprob for token in (*answer.prompt, *answer.tokens)]
        assert told == pytest.approx(logprobs, abs=1e-4)
        assert answer.finish == "length"


@pytest.mark.parametrize(("num_stages", "stages_held"), [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)])
async def test_greedy_tokens_and_logprobs_equal_transformers(
    family: Family, num_stages: int, stages_held: int, tmp_path: Path
) -> None:
    settings = {**SMALL_ITERATIONS, "stages_held": stages_held}
    async with running_node(family.folder, num_stages, tmp_path, **settings) as node:
        alone = await ask_all(node)
        async with training(node):
            mixed = await ask_all(node)
    assert_answers(alone, family.expected)
    assert_answers(mixed, family.expected)
    for answer in mixed:
        assert answer.versions[-1] > answer.versions[0], "no step came between two tokens"


async def test_bfloat16_answers_are_those_of_transformers_in_bfloat16(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save_tiny_model("llama", folder).to(torch.bfloat16)
    prompt = prompts()[3]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), dim=-1)
    expected = [logprobs[place, token].item() for place, token in enumerate(prompt[1:])]
    async with running_node(folder, 2, tmp_path, dtype="bfloat16", **SMALL_ITERATIONS) as node:
        answer = await node.complete(prompt, max_tokens=2, num_logprobs=0, prompt_logprobs=True)
    assert [token.logprob for token in answer.prompt] == pytest.approx(expected, abs=0.5)
