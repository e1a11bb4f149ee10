"""Which failures a batch is blamed for, and a loss that is no number."""

from pathlib import Path

import pytest
import torch

from services.stage_worker.executor.microbatches import MicrobatchRunner
from services.stage_worker.training import _failure
from services.stage_worker.weights import AdamWSettings, StageWeights
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
        (LemixError("the loss is not finite: nan"), True, False),
    ],
)
def test_a_batch_is_blamed_only_for_what_it_may_have_caused(
    error: Exception, is_batch_at_fault: bool, lacks_memory: bool
) -> None:
    failed = _failure("a", error)
    assert failed.is_batch_at_fault == is_batch_at_fault
    assert failed.lacks_memory == lacks_memory
    assert failed.reason == f"{type(error).__name__}: {error}"


def test_a_loss_that_is_not_finite_goes_no_way_back(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    (layers,) = model_partition(read_config(tmp_path), 1)
    stage = load_stage(tmp_path, layers)
    next(iter(stage.named_tensors().values())).detach().fill_(float("nan"))
    runner = MicrobatchRunner(stage, StageWeights(stage, AdamWSettings(), version=0), torch.device("cpu"))
    microbatch = Microbatch(
        epoch=1,
        batch_id="a",
        index=0,
        count=1,
        lengths=(3,),
        label_rows=(0, 1),
        labels=(2, 3),
        loss_weight=0.5,
        learning_rate=0.1,
    )

    with pytest.raises(LemixError, match="the loss is not finite"):
        runner.forward_and_backward(microbatch, torch.tensor([1, 2, 3]))

    assert all(parameter.grad is None for parameter in stage.named_tensors().values())
