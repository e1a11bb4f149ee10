"""The loss of preferences and its reference on one stage, against the formula."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.stage_worker.compute.slices import finish
from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.training.microbatches import MicrobatchRunner
from services.stage_worker.training.optimizers import OptimizerSettings
from services.stage_worker.training.preferences import Reference, preference_loss
from shared.model.loader import load_stage, model_partition, read_config
from tests.support.models import save_tiny_model
from tests.support.preferences import dpo_loss, preference_messages, random_pairs
from tests.support.training import assert_equal

CPU = torch.device("cpu")
PAIRS = random_pairs(4)
MICROBATCHES = [PAIRS[:1], PAIRS[1:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model("llama", path)
    return path


class OneStage:
    """A model of one stage, whose weights may be moved away from those that it was given."""

    def __init__(
        self, folder: Path, *, checkpointing: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        (layers,) = model_partition(read_config(folder), 1)
        self.num_read = 0

        def read() -> Mapping[str, Tensor]:
            self.num_read += 1
            given = load_stage(folder, layers).named_tensors()
            return {name: tensor.detach().to(dtype) for name, tensor in given.items()}

        stage = load_stage(folder, layers)
        self.weights = StageWeights(stage, OptimizerSettings(), version=0, dtype=dtype)
        self.runner = MicrobatchRunner(
            stage, self.weights, CPU, reference=Reference(read), checkpointing=checkpointing
        )

    def run(self, **changes: bool) -> tuple[float, dict[str, Tensor]]:
        """Forward and backward of all microbatches; returns the batch's loss and gradients."""
        loss = 0.0
        for forward in preference_messages("a", MICROBATCHES, **changes):
            microbatch, inputs = forward.microbatch, torch.tensor(forward.tokens)
            reference = finish(self.runner.reference(microbatch, inputs))
            _, share = finish(self.runner.forward(microbatch, inputs, reference))
            loss += share.item()
            finish(self.runner.backward("a", microbatch.index, None))
        return loss, {name: each.clone() for name, each in self.weights.finish_batch("a").items()}


def test_the_loss_is_that_of_the_formula() -> None:
    answers = torch.tensor([-3.0, -5.0, -2.0, -1.0], requires_grad=True)
    reference = torch.tensor([-4.0, -4.0, -2.5, -2.5])
    loss = preference_loss(answers, reference, 0.5)
    loss.backward()
    margins = (1.0 - -1.0, 0.5 - 1.5)
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-0.5 * margin)) for margin in margins))
    slopes = [-0.5 / (1 + math.exp(0.5 * margin)) for margin in margins]
    expected = [slopes[0], -slopes[0], slopes[1], -slopes[1]]
    assert answers.grad is not None and answers.grad.tolist() == pytest.approx(expected)


def test_a_large_margin_overflows_nothing() -> None:
    loss = preference_loss(torch.tensor([-4000.0, 0.0]), torch.zeros(2), 2.0)
    assert loss.item() == 8000.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_any_step_no_answer_is_gained_to_the_last_bit(folder: Path, dtype: torch.dtype) -> None:
    loss, _ = OneStage(folder, dtype=dtype).run()
    assert loss == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize(("checkpointing", "backward_after_all"), [(False, False), (True, True)])
def test_loss_and_gradients_after_steps_are_those_of_one_process(
    folder: Path, checkpointing: bool, backward_after_all: bool
) -> None:
    stage = OneStage(folder, checkpointing=checkpointing)
    model, given = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    for step in range(2):
        loss, gradients = stage.run(backward_after_all=backward_after_all)
        expected = dpo_loss(model, given, MICROBATCHES)
        expected.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert loss == pytest.approx(expected.item(), abs=1e-5)
        assert_equal(gradients, {name: each for name, each in found.items() if each is not None})
        stage.weights.step("a", 1e-2, version=step + 1)
        with torch.no_grad():
            learnt = stage.weights.master_tensors()
            for name, parameter in model.named_parameters():
                parameter.copy_(learnt[name])
        model.zero_grad()
    assert abs(loss - math.log(2)) > 0.01, "the steps have changed nothing"


def test_the_reference_is_read_once_and_stays_whatever_is_learnt_until_training_is_dropped(
    folder: Path,
) -> None:
    stage = OneStage(folder)
    (forward, _) = preference_messages("b", MICROBATCHES)
    assert stage.num_read == 0
    before = finish(stage.runner.reference(forward.microbatch, torch.tensor(forward.tokens)))
    stage.run()
    stage.weights.step("a", 1e-2, version=1)
    after = finish(stage.runner.reference(forward.microbatch, torch.tensor(forward.tokens)))
    assert torch.equal(before, after)
    assert not after.requires_grad
    assert stage.num_read == 1
    stage.runner.drop_all()
    again = finish(stage.runner.reference(forward.microbatch, torch.tensor(forward.tokens)))
    assert torch.equal(before, again)
    assert stage.num_read == 2
