"""Which failures a batch is blamed for, and a loss that is no number."""

from math import isfinite
from pathlib import Path

import pytest
import torch

from services.stage_worker.compute.slices import finish
from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.training.fenced_work import _failure
from services.stage_worker.training.microbatches import MicrobatchRunner
from services.stage_worker.training.optimizers import OptimizerSettings
from services.stage_worker.training.preferences import Reference
from shared.errors import CarrierError, LemixError, StaleTensorError
from shared.messages.training import Microbatch
from shared.model.loader import load_stage, model_partition, read_config
from tests.support.models import save_tiny_model


@pytest.mark.parametrize(
    ("error", "is_batch_at_fault", "lacks_memory"),
    [
        (CarrierError("no slot"), False, False),
        (StaleTensorError("gone"), False, False),
        (MemoryError(), False, True),
        (torch.OutOfMemoryError("2 GiB"), False, True),
        (RuntimeError("shapes differ"), True, False),
        (LemixError("no such microbatch"), True, False),
    ],
)
def test_a_batch_is_blamed_only_for_what_it_may_have_caused(
    error: Exception, is_batch_at_fault: bool, lacks_memory: bool
) -> None:
    failed = _failure("a", error)
    assert failed.is_batch_at_fault == is_batch_at_fault
    assert failed.lacks_memory == lacks_memory
    assert failed.reason == f"{type(error).__name__}: {error}"


def test_a_loss_that_is_not_finite_shows_in_the_gradients_norm(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    (layers,) = model_partition(read_config(tmp_path), 1)
    stage = load_stage(tmp_path, layers)
    next(iter(stage.named_tensors().values())).detach().fill_(float("nan"))
    weights = StageWeights(stage, OptimizerSettings(), version=0)
    runner = MicrobatchRunner(stage, weights, torch.device("cpu"), reference=Reference(dict))
    microbatch = Microbatch(
        fence=1,
        batch_id="a",
        index=0,
        count=1,
        lengths=(3,),
        label_rows=(0, 1),
        labels=(2, 3),
        loss_weight=0.5,
    )

    _, loss = finish(runner.forward(microbatch, torch.tensor([1, 2, 3])))
    finish(runner.backward("a", 0, None))
    weights.finish_batch("a")

    assert not isfinite(loss.item())
    assert not isfinite(weights.squared_norm("a"))
