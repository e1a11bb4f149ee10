"""Weights in bfloat16 that are learned in float32."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.training.optimizers import OptimizerSettings
from services.stage_worker.training.precision import chosen_dtype
from shared.model.loader import load_stage, model_partition, read_config
from shared.model.stage import Stage
from tests.support.models import save_tiny_model
from tests.support.training import training_forward

TINY_RATE = 1e-5
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model("llama", path)
    return path


def stage_of(folder: Path) -> Stage:
    return load_stage(folder, model_partition(read_config(folder), 1)[0])


def in_bfloat16(stage: Stage) -> StageWeights:
    return StageWeights(stage, OptimizerSettings(), version=0, dtype=torch.bfloat16)


def add_gradient(weights: StageWeights, factor: float) -> None:
    """A microbatch whose gradient of the parameter NAME is `factor` everywhere."""
    with training_forward(weights) as version:
        loss = version.leaves[NAME].sum() * factor
    loss.backward()
    weights.backward_done(version)


def step(weights: StageWeights, learning_rate: float) -> None:
    add_gradient(weights, 1.0)
    weights.finish_batch("b")
    weights.step("b", learning_rate, version=weights.version + 1)


def copies(weights: StageWeights) -> dict[str, Tensor]:
    return {name: master.detach().clone() for name, master in weights.master_tensors().items()}


def test_the_stage_computes_in_bfloat16_and_its_buffers_stay(folder: Path) -> None:
    stage = stage_of(folder)
    buffers = [buffer.dtype for buffer in stage.model.buffers()]
    weights = in_bfloat16(stage)
    assert {parameter.dtype for parameter in stage.parameters()} == {torch.bfloat16}
    assert [buffer.dtype for buffer in stage.model.buffers()] == buffers
    for name, tensor in stage_of(folder).named_tensors().items():
        assert torch.equal(weights.master_tensors()[name], tensor)
        assert torch.equal(stage.parameter(name), tensor.bfloat16())


def test_steps_below_the_resolution_of_bfloat16_add_up(folder: Path) -> None:
    stage = stage_of(folder)
    weights = in_bfloat16(stage)
    before, rounded_before = copies(weights)[NAME], stage.parameter(NAME).detach().clone()
    alone = torch.nn.Parameter(rounded_before.clone())
    plain = AdamW([alone], lr=TINY_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(1000):
        step(weights, TINY_RATE)
        alone.grad = torch.ones_like(alone)
        plain.step()
    moved = before - copies(weights)[NAME]
    torch.testing.assert_close(moved, torch.full_like(moved, 1000 * TINY_RATE), rtol=0.01, atol=0)
    assert torch.equal(stage.parameter(NAME), copies(weights)[NAME].bfloat16())
    large = rounded_before.abs() > 0.1
    assert (stage.parameter(NAME) != rounded_before)[large].all()
    assert (alone == rounded_before)[large].all(), "without masters such steps are lost"


def test_gradients_are_summed_in_float32_over_a_batch(folder: Path) -> None:
    weights = in_bfloat16(stage_of(folder))
    for factor in (256.0, 1.0, 1.0, 1.0):  # 256 + 1 is 256 in bfloat16
        add_gradient(weights, factor)
    total = weights.finish_batch("b")[NAME]
    assert total.dtype == torch.float32
    assert torch.equal(total, torch.full_like(total, 259.0))


def test_a_step_leaves_a_forwards_weights_to_its_backward(folder: Path) -> None:
    stage = stage_of(folder)
    weights = in_bfloat16(stage)
    before = stage.parameter(NAME).detach().clone()
    with training_forward(weights) as version:
        loss = version.leaves[NAME].square().sum()
    step(weights, 0.1)
    assert not torch.equal(stage.parameter(NAME), before)
    loss.backward()
    weights.backward_done(version)
    assert torch.equal(weights.finish_batch("late")[NAME], 2 * before.float())


def test_masters_and_optimizer_state_come_back(folder: Path) -> None:
    weights = in_bfloat16(stage_of(folder))
    step(weights, TINY_RATE)
    saved = copies(weights)
    state = {key: value.clone() for key, value in weights.optimizer_state().items()}
    assert {value.dtype for value in (*saved.values(), *state.values())} == {torch.float32}
    step(weights, TINY_RATE)

    stage = stage_of(folder)
    restored = in_bfloat16(stage)
    step(restored, 0.1)
    restored.load(saved, state, version=1)
    assert torch.equal(stage.parameter(NAME), saved[NAME].bfloat16())
    step(restored, TINY_RATE)
    for name, master in weights.master_tensors().items():
        assert torch.equal(restored.master_tensors()[name], master), name


@pytest.mark.parametrize(
    ("setting", "published", "device", "expected"),
    [
        ("auto", torch.bfloat16, "cuda:1", torch.bfloat16),
        ("auto", torch.float16, "cuda:0", torch.bfloat16),
        ("auto", torch.float32, "cuda:0", torch.float32),
        ("auto", None, "cuda:0", torch.float32),
        ("auto", torch.bfloat16, "cpu", torch.float32),
        ("float32", torch.bfloat16, "cuda:0", torch.float32),
        ("bfloat16", torch.float32, "cpu", torch.bfloat16),
    ],
)
def test_the_dtype_follows_from_the_model_and_the_device_unless_it_is_set(
    setting: str, published: torch.dtype | None, device: str, expected: torch.dtype
) -> None:
    config = SimpleNamespace(dtype=published)
    assert chosen_dtype(setting, config, torch.device(device)) == expected


def test_the_dtype_of_published_weights_is_in_the_config(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert chosen_dtype("auto", read_config(tmp_path), torch.device("cuda:0")) == torch.bfloat16
