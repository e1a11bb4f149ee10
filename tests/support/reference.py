"""The answers of transformers itself."""

from typing import Any

import pytest
import torch

from tests.support.node import Answer


def greedy_reference(model: Any, prompt: list[int], max_tokens: int) -> tuple[list[int], list[float]]:
    """Tokens of `generate()`; log-probabilities of all tokens but the first under one plain forward."""
    inputs = torch.tensor([prompt], device=model.device)
    everything = torch.ones_like(inputs)  # else generate() takes token 0 for padding
    whole = model.generate(inputs, attention_mask=everything, max_new_tokens=max_tokens, do_sample=False)[0]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(whole.unsqueeze(0)).logits[0], dim=-1)
    chosen = logprobs[:-1].gather(1, whole[1:].unsqueeze(1)).squeeze(1).tolist()
    return whole[len(prompt) :].tolist(), chosen


def assert_served(answer: Answer, model: Any, *, tolerance: float = 1e-4) -> None:
    """Every log-probability of prompt and completion is that of the whole model."""
    tokens = [*answer.task.prompt, *answer.token_ids]
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    expected = [logprobs[row, token].item() for row, token in enumerate(tokens[1:])]
    got = [one.logprob for one in (*answer.prompt, *answer.tokens) if one.logprob is not None]
    assert got[-len(expected) :] == pytest.approx(expected, abs=tolerance)
