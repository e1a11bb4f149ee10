"""A node whose stages share one GPU, against transformers and a plain loop on the same GPU."""

import asyncio
from pathlib import Path

import pytest
import torch

from tests.integration.test_pipeline_training import (
    NUM_BATCHES,
    Feeder,
    train_in_one_process,
    weights_of,
)
from tests.support.models import FAMILIES, VOCAB_SIZE, save_tiny_model
from tests.support.node import running_node
from tests.support.reference import greedy_reference
from tests.support.training import ADAMW, assert_equal, random_batches

DEVICE = "cuda:0"
NUM_STAGES = 2
MAX_TOKENS = 12
PROMPTS = [[(7 * place + length) % VOCAB_SIZE for place in range(length)] for length in (1, 3, 17, 40)]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_answers_equal_transformers(family: str, tmp_path: Path) -> None:
    model = save_tiny_model(family, tmp_path / "model").to(DEVICE)
    async with running_node(
        tmp_path / "model", NUM_STAGES, tmp_path, device=DEVICE, max_iteration_tokens=24
    ) as node:
        answers = await asyncio.gather(
            *(node.complete(p, max_tokens=MAX_TOKENS, num_logprobs=0, prompt_logprobs=True) for p in PROMPTS)
        )
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens, logprobs = greedy_reference(model, prompt, MAX_TOKENS)
        assert answer.token_ids == tokens
        told = [token.logprob for token in (*answer.prompt, *answer.tokens)]
        assert told == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
async def test_synchronous_training_equals_one_process(family: str, tmp_path: Path) -> None:
    model = save_tiny_model(family, tmp_path / "model").to(DEVICE)
    batches = random_batches(NUM_BATCHES, 1)
    async with running_node(tmp_path / "model", NUM_STAGES, tmp_path, device=DEVICE, **ADAMW) as node:
        await node.restore()
        feeder = Feeder(node)
        await feeder.sync(batches)
        weights = await weights_of(node, NUM_BATCHES, tmp_path / "checkpoints" / "end")
    losses = train_in_one_process(model, batches)
    assert list(feeder.losses.values()) == pytest.approx(losses, abs=1e-5)
    assert_equal(weights, {name: tensor.cpu() for name, tensor in model.state_dict().items()})
