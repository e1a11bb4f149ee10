"""Sequences that lose their blocks and share them, on real stages: the answers are what they always are."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.test_pipeline_mixed import step
from tests.support.models import VOCAB_SIZE, save_tiny_model
from tests.support.node import Answer, Node, running_node
from tests.support.reference import greedy_reference
from tests.support.training import random_batches

MAX_TOKENS = 40
CRAMPED: dict[str, Any] = {"kv_tokens": 112, "max_iteration_tokens": 24}
"""Room for one whole answer and a bit: seven blocks of 16 tokens."""
WAYS: list[dict[str, Any]] = [
    {"num_logprobs": 2, "prompt_logprobs": True},
    {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.7, "presence_penalty": 0.3},
    {"temperature": 0.8, "seed": 6, "repetition_penalty": 1.5, "num_logprobs": 0},
    {"temperature": 1.0, "seed": 7, "top_p": 0.9, "top_k": 20},
]
"""How tokens are asked for: greedy with log-probabilities, and draws that depend on the tokens before."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model("llama", path)
    return path


def prompt_of(seed: int, length: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


async def ask_in_all_ways(node: Node) -> list[Answer]:
    asked = [
        node.complete(prompt_of(number, 10 + 7 * number), max_tokens=MAX_TOKENS, **way)
        for number, way in enumerate(WAYS)
    ]
    return await asyncio.gather(*asked)


def logprobs_of(answer: Answer) -> list[float | None]:
    return [token.logprob for token in (*answer.prompt, *answer.tokens)]


@pytest.mark.parametrize("num_stages", [1, 2])
async def test_answers_are_the_same_where_sequences_lose_their_blocks(
    num_stages: int, folder: Path, tmp_path: Path
) -> None:
    async with running_node(folder, num_stages, tmp_path) as node:
        expected = await ask_in_all_ways(node)
        assert node.heartbeats[0].preempted == 0
    async with running_node(folder, num_stages, tmp_path, **CRAMPED) as node:
        answers = await ask_in_all_ways(node)
        await node.heard(lambda: node.heartbeats[0].preempted > 0)
        await node.heard(lambda: node.heartbeats[0].kv_blocks_used == 0)
    for answer, roomy in zip(answers, expected, strict=True):
        assert (answer.failure, answer.finish) == (None, "length")
        assert answer.token_ids == roomy.token_ids
        assert logprobs_of(answer) == [
            None if one is None else pytest.approx(one, abs=1e-4) for one in logprobs_of(roomy)
        ]


@pytest.mark.parametrize("num_stages", [1, 2])
async def test_a_prompt_that_begins_like_another_is_answered_like_transformers(
    num_stages: int, folder: Path, tmp_path: Path
) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    beginning = prompt_of(1, 50)
    prompts = [beginning, beginning, beginning[:33] + prompt_of(2, 9), beginning[:32], beginning[:20]]
    async with running_node(folder, num_stages, tmp_path) as node:
        answers = [await node.complete(prompt, max_tokens=20, num_logprobs=0) for prompt in prompts]
        goes_on = beginning + answers[0].token_ids + prompt_of(3, 5)
        answers.append(await node.complete(goes_on, max_tokens=20, num_logprobs=0))
        scored = await node.complete(beginning, max_tokens=1, num_logprobs=0, prompt_logprobs=True)
    assert [answer.num_cached for answer in answers] == [0, 48, 32, 16, 16, 64]
    for prompt, answer in zip([*prompts, goes_on], answers, strict=True):
        tokens, logprobs = greedy_reference(model, prompt, 20)
        assert answer.token_ids == tokens
        told = [token.logprob for token in answer.tokens]
        assert told == pytest.approx(logprobs[len(prompt) - 1 :], abs=1e-4)
    assert (scored.num_cached, len(scored.prompt)) == (0, 49)


@pytest.mark.parametrize("num_stages", [1, 2])
async def test_choices_of_a_prompt_share_it_and_are_those_of_separate_requests(
    num_stages: int, folder: Path, tmp_path: Path
) -> None:
    prompt, ways = prompt_of(4, 40), [{"temperature": 1.0, "seed": seed} for seed in range(8)]
    async with running_node(folder, num_stages, tmp_path) as node:
        together = await asyncio.gather(*(node.complete(prompt, max_tokens=12, **way) for way in ways))
    separate = []
    for seed in (0, 7):
        async with running_node(folder, num_stages, tmp_path) as node:
            separate.append(await node.complete(prompt, max_tokens=12, **ways[seed]))
    assert sorted(answer.num_cached for answer in together) == [0] + 7 * [32]
    assert [together[0].token_ids, together[7].token_ids] == [answer.token_ids for answer in separate]
    assert len({tuple(answer.token_ids) for answer in together}) > 4


@pytest.mark.parametrize(("serving", "num_stages"), [("newest", 1), ("newest", 2), ("published", 2)])
async def test_no_version_reads_what_another_has_written(
    serving: Any, num_stages: int, folder: Path, tmp_path: Path
) -> None:
    prompt, batch = prompt_of(5, 40), random_batches(1, 2)[0]
    async with running_node(folder, num_stages, tmp_path, training_patience_s=0.0) as node:
        await node.restore(serving=serving)
        node.keeps, node.learning_rate = serving != "newest", 0.05
        old = [await node.complete(prompt, max_tokens=12) for _ in range(2)]
        await step(node, "b1", batch)
        if serving != "newest":
            await node.publish(1)
            await node.until_published(1)
        new = [await node.complete(prompt, max_tokens=12) for _ in range(2)]
        await node.restore(fence=2, serving=serving)
        back = [await node.complete(prompt, max_tokens=12) for _ in range(2)]
    assert [answer.num_cached for answer in (*old, *new, *back)] == [0, 32] * 3
    assert [set(answer.versions) for answer in (*old, *new)] == [{0}, {0}, {1}, {1}]
    told = [answer.token_ids for answer in (*old, *new, *back)]
    assert told[0] == told[1] == told[4] == told[5] != told[2] == told[3]


async def test_a_stage_that_was_restarted_is_asked_for_nothing_that_it_never_wrote(
    folder: Path, tmp_path: Path
) -> None:
    prompt = prompt_of(6, 40)
    async with running_node(folder, 2, tmp_path) as node:
        first = await node.complete(prompt, max_tokens=12)
        await node.replace(1)
        await node.ready()
        again = [await node.complete(prompt, max_tokens=12) for _ in range(2)]
    assert [answer.num_cached for answer in again] == [0, 32]
    assert [answer.token_ids for answer in again] == [first.token_ids] * 2
