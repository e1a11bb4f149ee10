"""LoRA through the stages' own training, without a node: gradients and weights against peft."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.stage_worker.compute.slices import finish
from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.training.microbatches import MicrobatchRunner
from services.stage_worker.training.optimizers import OptimizerSettings
from services.stage_worker.training.preferences import Reference
from shared.messages.training import MicrobatchForward
from shared.model.loader import load_stage, model_partition, read_config
from shared.model.lora import ALL_LINEAR, LoraSettings, adapter_config, add_adapter, in_adapter_names
from shared.model.stage import Stage
from tests.support.models import save_tiny_model
from tests.support.training import (
    ADAMW,
    LEARNING_RATE,
    adamw,
    loss_of,
    messages,
    num_labels,
    random_batches,
    training_forward,
)

LORA = LoraSettings(rank=4, alpha=12, targets=(ALL_LINEAR,))
OPTIMIZER = OptimizerSettings(
    beta1=ADAMW["optimizer_beta1"],
    beta2=ADAMW["optimizer_beta2"],
    epsilon=ADAMW["optimizer_epsilon"],
    weight_decay=ADAMW["weight_decay"],
)
CPU = torch.device("cpu")


class Pipeline:
    """The stages of one model, one microbatch at a time."""

    def __init__(self, folder: Path, num_stages: int, *, checkpointing: bool = False) -> None:
        parts = model_partition(read_config(folder), num_stages)
        self.stages = [load_stage(folder, part) for part in parts]
        for stage in self.stages:
            add_adapter(stage, LORA)
        self.weights = [StageWeights(stage, OPTIMIZER, version=0) for stage in self.stages]
        self._runners = [
            MicrobatchRunner(stage, weights, CPU, reference=Reference(dict), checkpointing=checkpointing)
            for stage, weights in zip(self.stages, self.weights, strict=True)
        ]

    def run(self, batch: list[MicrobatchForward]) -> tuple[float, dict[str, Tensor]]:
        """Forward and backward of all microbatches; returns the batch's loss and gradients."""
        loss = sum(self._run_one(forward) for forward in batch)
        batch_id = batch[0].microbatch.batch_id
        found = [weights.finish_batch(batch_id) for weights in self.weights]
        return loss, {name: tensor.clone() for part in found for name, tensor in part.items()}

    def step(self, batch: list[MicrobatchForward]) -> None:
        for weights in self.weights:
            weights.step(batch[0].microbatch.batch_id, LEARNING_RATE, version=weights.version + 1)

    def adapter(self) -> dict[str, Tensor]:
        return {
            name: tensor
            for stage in self.stages
            for name, tensor in in_adapter_names(stage.trainable_tensors()).items()
        }

    def _run_one(self, forward: MicrobatchForward) -> float:
        microbatch, rows = forward.microbatch, torch.tensor(forward.tokens)
        for runner in self._runners:
            _, rows = finish(runner.forward(microbatch, rows))
        gradient = None
        for runner in reversed(self._runners):
            gradient = finish(runner.backward(microbatch.batch_id, microbatch.index, gradient))
        assert gradient is None
        return rows.item()


def peft_model(folder: Path, pipeline: Pipeline) -> Any:
    """The whole model in one piece with the adapter that the stages begin with."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = adapter_config(pipeline.stages[0], str(folder))
    config.inference_mode = False
    wrapped = get_peft_model(model, config).eval()
    set_peft_model_state_dict(wrapped, {name: tensor.clone() for name, tensor in pipeline.adapter().items()})
    return wrapped


def trained_by(model: Any) -> dict[str, Tensor]:
    """Its trainable parameters by the names of the stages."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5)


def values(stages: list[Stage]) -> list[tuple[int, Tensor]]:
    """Where each tensor that does not train lies, and a copy of it."""
    tensors = [tensor for stage in stages for tensor in stage.base_tensors().values()]
    return [(tensor.data_ptr(), tensor.detach().clone()) for tensor in tensors]


@pytest.mark.parametrize(
    ("family", "num_stages", "checkpointing"),
    [
        *(("llama", num_stages, False) for num_stages in (1, 2, 3, 4)),
        *((family, num_stages, False) for family in ("llama_tied", "gpt2", "qwen2") for num_stages in (1, 3)),
        ("llama", 3, True),
    ],
)
def test_gradients_and_weights_equal_those_of_peft(
    family: str, num_stages: int, checkpointing: bool, tmp_path: Path
) -> None:
    save_tiny_model(family, tmp_path)
    pipeline = Pipeline(tmp_path, num_stages, checkpointing=checkpointing)
    base = values(pipeline.stages)
    reference = peft_model(tmp_path, pipeline)
    parameters = dict(reference.named_parameters())
    optimizer = adamw(trained_by(reference).values())
    for number, batch in enumerate(random_batches(3, 1 + num_stages)):
        forwards = messages(f"b{number}", batch)
        loss, gradients = pipeline.run(forwards)
        expected = torch.stack(
            [loss_of(reference, parameters, examples, num_labels(batch)) for examples in batch]
        ).sum()
        expected.backward()
        assert loss == pytest.approx(expected.item(), abs=1e-5)
        assert_close(gradients, {n: p.grad for n, p in trained_by(reference).items() if p.grad is not None})
        pipeline.step(forwards)
        optimizer.step()
        optimizer.zero_grad()
    saved = {name.removeprefix("base_model.model."): tensor for name, tensor in pipeline.adapter().items()}
    assert_close(saved, trained_by(reference))
    for (place, tensor), (place_before, before) in zip(values(pipeline.stages), base, strict=True):
        assert place == place_before
        assert torch.equal(tensor, before)


def test_only_the_adapter_is_stashed_and_has_an_optimizer_state(tmp_path: Path) -> None:
    save_tiny_model("llama_tied", tmp_path)
    pipeline = Pipeline(tmp_path, 1)
    (stage,), (weights,) = pipeline.stages, pipeline.weights
    forwards = messages("b", random_batches(1, 2)[0])
    with training_forward(weights) as version:
        assert version.leaves.keys() == set(stage.adapter_names)
        assert stage.trainable_tensors() == version.leaves
    pipeline.run(forwards)
    pipeline.step(forwards)
    assert {key.partition(".")[2] for key in weights.optimizer_state()} == set(stage.adapter_names)
