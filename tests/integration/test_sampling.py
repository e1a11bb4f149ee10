"""How a node draws what requests ask for, beside transformers; and what its last stage remembers."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from services.stage_worker.compute import torch_executor
from services.stage_worker.compute.graphs import run_again
from tests.support.models import VOCAB_SIZE, save_tiny_model
from tests.support.node import Node, running_node
from tests.support.reference import greedy_reference

MAX_TOKENS = 10
ENDLESS: dict[str, Any] = {"max_tokens": 3000}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.7},
    {"temperature": 1.5, "top_k": 9, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.7},
    {"temperature": 1.1, "frequency_penalty": 0.8, "presence_penalty": 0.6},
    {"temperature": 0.9, "logit_bias": ((4, 3.0), (90, -100.0)), "num_logprobs": 3},
    {"temperature": 1.3, "min_tokens": 7, "stop_token_ids": tuple(range(0, VOCAB_SIZE, 3))},
    {
        "temperature": 1.4,
        "top_p": 0.95,
        "top_k": 50,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.4,
        "logit_bias": ((7, 1.5),),
        "min_tokens": 5,
        "stop_token_ids": (11, 12),
    },
]


def prompt(number: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(VOCAB_SIZE, (3 + 4 * number,), generator=generator).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model("llama", folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The answer of each kind with seed 5, asked for when nothing else ran."""

    async def ask() -> list[list[int]]:
        async with running_node(folder, 1, tmp_path_factory.mktemp("alone")) as node:
            return [
                (await node.complete(prompt(number), max_tokens=MAX_TOKENS, seed=5, **kind)).token_ids
                for number, kind in enumerate(KINDS)
            ]

    return asyncio.run(ask())


@pytest.mark.parametrize("num_stages", [1, 3])
async def test_greedy_answers_with_penalties_equal_transformers(num_stages: int, tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    asked: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.8, "logit_bias": ((3, 2.0), (17, -9.0))},
        {"repetition_penalty": 1.3, "min_tokens": 10, "stop_token_ids": tuple(range(0, VOCAB_SIZE, 2))},
    ]
    async with running_node(tmp_path / "model", num_stages, tmp_path, max_iteration_tokens=8) as node:
        answers = await asyncio.gather(
            *(node.complete(prompt(number), max_tokens=16, **one) for number, one in enumerate(asked))
        )
    for number, (answer, one) in enumerate(zip(answers, asked, strict=True)):
        assert answer.token_ids == generated(model, prompt(number), one)
        assert answer.finish == ("stop" if "stop_token_ids" in one else "length")


def generated(model: Any, prompt: list[int], sampling: dict[str, Any]) -> list[int]:
    """What `generate()` of transformers makes of the same wishes."""
    inputs = torch.tensor([prompt])
    biases = {(token,): bias for token, bias in sampling.get("logit_bias", ())}
    whole = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=16,
        repetition_penalty=sampling["repetition_penalty"],
        sequence_bias=biases or None,
        min_new_tokens=sampling.get("min_tokens"),
        eos_token_id=list(sampling.get("stop_token_ids", ())) or None,
    )
    tokens: list[int] = whole[0, len(prompt) :].tolist()
    return tokens


async def draw_all(node: Node, *, seed: int) -> list[list[int]]:
    """Answers of all kinds, asked for at once."""
    answers = await asyncio.gather(
        *(
            node.complete(prompt(number), max_tokens=MAX_TOKENS, seed=seed, **kind)
            for number, kind in enumerate(KINDS)
        )
    )
    return [answer.token_ids for answer in answers]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
async def test_the_same_seed_gives_the_same_text_whatever_else_is_in_the_batch(
    num_stages: int, alone: list[list[int]], folder: Path, tmp_path: Path
) -> None:
    async with running_node(folder, num_stages, tmp_path, max_iteration_tokens=24) as node:
        among_others, others = await asyncio.gather(draw_all(node, seed=5), draw_all(node, seed=6))
    assert among_others == alone
    assert sum(one != other for one, other in zip(alone, others, strict=True)) >= 6


async def test_steps_that_draw_and_go_ahead_of_the_host_give_the_same_text(
    alone: list[list[int]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where nothing is captured: the steps are the ones that a GPU replays."""
    monkeypatch.setattr(torch_executor, "capture_for", lambda device: run_again)
    async with running_node(folder, 1, tmp_path, max_iteration_tokens=24) as node:
        together = await draw_all(node, seed=5)
    assert together == alone


async def test_penalties_see_what_was_said(folder: Path, tmp_path: Path) -> None:
    """Each token is drawn once where repeating one costs more than any logit is worth."""
    async with running_node(folder, 1, tmp_path) as node:
        plain = await node.complete(prompt(1), max_tokens=30)
        once = await node.complete(prompt(1), max_tokens=30, presence_penalty=1000.0)
        new = await node.complete(prompt(1), max_tokens=30, repetition_penalty=1e6, logit_bias=above_zero())
    assert max(Counter(plain.token_ids).values()) > 1
    assert max(Counter(once.token_ids).values()) == 1
    assert max(Counter(new.token_ids).values()) == 1
    assert not set(new.token_ids) & set(prompt(1))


def above_zero() -> tuple[tuple[int, float], ...]:
    """A bias that makes all logits positive, so that a repetition penalty makes them small."""
    return tuple((token, 1000.0) for token in range(VOCAB_SIZE))


async def test_log_probabilities_are_the_models_own_whatever_is_asked(folder: Path, tmp_path: Path) -> None:
    async with running_node(folder, 2, tmp_path) as node:
        plain = await node.complete(prompt(2), max_tokens=1, num_logprobs=20)
        bent = await node.complete(
            prompt(2), max_tokens=1, num_logprobs=20, logit_bias=((5, 100.0),), temperature=0.3, seed=1
        )
    assert bent.token_ids == [5]
    assert len(plain.tokens[0].top) == 20
    assert bent.tokens[0].top == plain.tokens[0].top


async def test_a_bias_for_a_token_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    async with running_node(folder, 1, tmp_path) as node:
        for token in (-1, VOCAB_SIZE):
            refused = await node.complete(prompt(1), max_tokens=2, logit_bias=((token, 1.0),))
            assert refused.failure is not None
            assert (refused.failure.code, f"logit_bias: {token}" in refused.failure.reason) == (400, True)


@pytest.mark.parametrize("num_stages", [1, 3])
async def test_the_last_stage_forgets_who_is_gone(num_stages: int, folder: Path, tmp_path: Path) -> None:
    async with running_node(folder, num_stages, tmp_path) as node:
        cancelled = await node.start(prompt(1), **ENDLESS)
        expiring = await node.start(prompt(2), timeout_s=1.5, **ENDLESS)
        await asyncio.gather(cancelled.first_token(), expiring.first_token())
        assert node.num_remembered == 2
        await node.cancel(cancelled)
        await expiring.end()
        assert expiring.failure is not None
        await node.complete(prompt(3), max_tokens=2)
        assert node.num_remembered <= 1, "only the one that has just ended"

        await node.restore(fence=1, version=0, serving="published")
        wanting = await node.start(prompt(1), changes={"weights_version": 0}, **ENDLESS)
        await wanting.first_token()
        await node.restore(fence=2, version=7, serving="published")
        await wanting.end()
        assert wanting.failure is not None
        await node.complete(prompt(3), max_tokens=2)
        assert node.num_remembered <= 1, "only the one that has just ended"


@pytest.mark.parametrize("replaced", [0, 1, 2])
async def test_the_last_stage_forgets_all_when_a_stage_is_restarted(
    replaced: int, folder: Path, tmp_path: Path
) -> None:
    async with running_node(folder, 3, tmp_path) as node:
        lost = await node.start(prompt(1), **ENDLESS)
        await lost.first_token()
        await node.replace(replaced)
        await node.ready()
        await node.complete(prompt(3), max_tokens=2)
        assert node.num_remembered <= 1, "only the one that has just ended"


@pytest.mark.parametrize("num_stages", [1, 2])
async def test_logits_that_are_no_numbers_fail_one_request_and_mark_the_version(
    num_stages: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One token's embedding is NaN: whoever says it fails, the others go on."""
    model, poison = save_tiny_model("llama", tmp_path / "model"), 40
    expected = greedy_reference(model, prompt(3), 12)[0]
    assert poison not in prompt(3) + expected
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.nan
    model.save_pretrained(tmp_path / "model")
    async with running_node(tmp_path / "model", num_stages, tmp_path) as node:
        asked = (
            node.complete(prompt(3), max_tokens=12),
            node.complete([5, poison, 6], max_tokens=12, num_logprobs=3, prompt_logprobs=True),
            node.complete([poison], max_tokens=0, num_logprobs=0, prompt_logprobs=True),
            node.complete([5], max_tokens=9, temperature=1.0, logit_bias=((poison, 1000.0),)),
        )
        good, *sick = await asyncio.gather(*asked)
        after = await node.complete(prompt(3), max_tokens=12)
        assert node.num_remembered <= 1, "only the one that has just ended"
        await node.heard(lambda: node.heartbeats[num_stages - 1].sick_version == 0)
    assert good.token_ids == after.token_ids == expected
    assert [one.failure and (one.failure.code, one.failure.reason) for one in sick] == [
        (500, "the model's logits are not finite"),
        None,
        (500, "the model's logits are not finite"),
    ]
    assert caplog.text.count("weights version 0 is sick") == 1
