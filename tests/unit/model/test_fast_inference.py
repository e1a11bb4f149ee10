from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.model.attention import PackedSegments
from shared.model.fast_inference import InferenceWeights, PackedWeights, enable_fast_inference
from shared.model.loader import load_stage
from shared.model.partition import partition
from shared.model.stage import Stage

FAMILIES = ["llama", "llama-tied", "qwen2-window", "qwen3", "mistral-window", "gpt2", "gpt-neox"]


@torch.no_grad()
def logits(stage: Stage) -> torch.Tensor:
    tokens = torch.arange(9)
    return stage.forward(tokens, tokens, PackedSegments((9,)))


def fast_stage(folder: Path) -> tuple[Stage, InferenceWeights]:
    stage = load_stage(folder, partition(5, 1)[0])
    return stage, enable_fast_inference(stage)


@pytest.mark.parametrize("family", FAMILIES)
def test_results_stay_within_1e_5(family: str, model_folder: Callable[[str], Path]) -> None:
    plain = logits(load_stage(model_folder(family), partition(5, 1)[0]))
    stage, weights = fast_stage(model_folder(family))
    assert weights.packed
    weights.repack()
    torch.testing.assert_close(logits(stage), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("swap", [False, True], ids=["in-place", "swapped"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_changed_weights_are_noticed(family: str, swap: bool, model_folder: Callable[[str], Path]) -> None:
    stage, weights = fast_stage(model_folder(family))
    reference = load_stage(model_folder(family), partition(5, 1)[0])
    weights.repack()
    logits(stage)
    for name, parameter in stage.named_tensors().items():
        if swap:
            stage.set_parameter(name, torch.nn.Parameter(parameter.detach() * 1.1))
        else:
            with torch.no_grad():
                parameter.mul_(1.1)
        reference.set_parameter(name, stage.parameter(name))
    for _ in range(7):  # plain at first, packed again later
        torch.testing.assert_close(logits(stage), logits(reference), rtol=1e-4, atol=1e-5)


def test_weights_written_unseen_need_to_be_invalidated(model_folder: Callable[[str], Path]) -> None:
    stage, weights = fast_stage(model_folder("llama"))
    weights.repack()
    before = logits(stage)
    stage.parameter("model.layers.2.mlp.down_proj.weight").data.mul_(2.0)
    assert torch.equal(logits(stage), before)
    weights.invalidate()
    assert not torch.allclose(logits(stage), before)


def test_fresh_weights_are_packed_only_after_some_calls() -> None:
    packed = PackedWeights([torch.nn.Linear(8, 8)], patience_calls=2)
    assert [packed.ready() for _ in range(4)] == [False, False, True, True]


def test_stages_in_other_dtypes_are_left_alone(model_folder: Callable[[str], Path]) -> None:
    stage = load_stage(model_folder("llama"), partition(5, 1)[0], dtype=torch.float64)
    assert enable_fast_inference(stage).packed == ()
