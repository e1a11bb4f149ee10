"""Gradients of stages chained by hand are those of the whole model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from shared.model.attention import PackedSegments
from shared.model.fast_inference import enable_fast_inference
from shared.model.loader import load_stage
from shared.model.partition import partition
from shared.model.stage import Stage

FAMILIES = ["llama", "llama-tied", "qwen2", "qwen2-window", "qwen3", "mistral-window", "gpt2", "gpt-neox"]


def staged_gradients(
    stages: list[Stage], tokens: torch.Tensor, lengths: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """The way a pipeline does it: each stage's backward starts from the gradient of the next one's input."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    inputs, outputs = [], []
    hidden = tokens
    for stage in stages:
        inputs.append(hidden if stage.layers.is_first else hidden.detach().requires_grad_())
        hidden = stage.forward(inputs[-1], positions, PackedSegments(lengths))
        outputs.append(hidden)
    cross_entropy(outputs.pop(), tokens.roll(1)).backward()
    for received, sent in zip(reversed(inputs[1:]), reversed(outputs), strict=True):
        sent.backward(received.grad)
    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_tensors().items():
            assert parameter.grad is not None, name
            gradients[name] = gradients[name] + parameter.grad if name in gradients else parameter.grad
    return gradients


def whole_gradients(model: Any, tokens: torch.Tensor, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    logits = torch.cat([model(segment[None]).logits[0] for segment in tokens.split(lengths)])
    cross_entropy(logits, tokens.roll(1)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("lengths", [(7, 7, 7), (9, 1, 5)])
@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(
    family: str,
    num_stages: int,
    lengths: tuple[int, ...],
    model_folder: Callable[[str], Path],
    whole_model: Callable[..., Any],
) -> None:
    torch.manual_seed(2)
    tokens = torch.randint(0, 97, (sum(lengths),))
    stages = [
        load_stage(model_folder(family), layers, dtype=torch.float64) for layers in partition(5, num_stages)
    ]
    found = staged_gradients(stages, tokens, lengths)
    expected = whole_gradients(whole_model(family, torch.float64), tokens, lengths)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_fast_inference_leaves_gradients_as_they_are(model_folder: Callable[[str], Path]) -> None:
    tokens = torch.arange(8)
    stages = [load_stage(model_folder("llama"), layers) for layers in partition(5, 2)]
    plain = staged_gradients(stages, tokens, (4, 4))
    for stage in stages:
        for parameter in stage.parameters():
            parameter.grad = None
        enable_fast_inference(stage).prepare()
    fast = staged_gradients(stages, tokens, (4, 4))
    assert all(torch.equal(plain[name], fast[name]) for name in plain)
