"""A forward whose saved tensors lie in host memory gives the same gradients, steps in between included."""

from pathlib import Path

import torch
from torch import Tensor

from services.stage_worker.executor.microbatches import MicrobatchRunner
from services.stage_worker.optimizers import OptimizerSettings
from services.stage_worker.weights import StageWeights
from shared.messages.training import Microbatch
from shared.model.loader import load_stage, model_partition, read_config
from tests.support.models import save_tiny_model

LENGTHS = (3, 4)


def microbatch(batch_id: str, *, offload: bool) -> Microbatch:
    return Microbatch(
        epoch=1,
        batch_id=batch_id,
        index=0,
        count=1,
        lengths=LENGTHS,
        label_rows=(),
        labels=(),
        loss_weight=1.0,
        offload=offload,
    )


def trained(folder: Path, *, offload: bool) -> list[dict[str, Tensor]]:
    """The first stage's gradients of two batches: the second one's forward precedes the first one's step."""
    layers = model_partition(read_config(folder), 2)[0]
    stage = load_stage(folder, layers)
    weights = StageWeights(stage, OptimizerSettings(), version=0)
    runner = MicrobatchRunner(stage, weights, torch.device("cpu"))
    tokens = torch.arange(sum(LENGTHS))
    outputs = {}
    for batch_id in ("a", "b"):
        _, outputs[batch_id] = runner.forward(microbatch(batch_id, offload=offload), tokens)
    gradients = []
    for batch_id in ("a", "b"):
        runner.backward(batch_id, 0, torch.ones_like(outputs[batch_id]))
        found = weights.finish_batch(batch_id)
        gradients.append({name: gradient.clone() for name, gradient in found.items()})
        weights.step(batch_id, 0.1, version=weights.version + 1)
    return gradients


def test_offloading_changes_no_gradient(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    plain, offloaded = (trained(tmp_path, offload=offload) for offload in (False, True))
    assert len(plain) == len(offloaded) == 2
    for expected, got in zip(plain, offloaded, strict=True):
        assert expected.keys() == got.keys()
        for name, gradient in expected.items():
            assert gradient.abs().sum() > 0 or "bias" in name
            torch.testing.assert_close(got[name], gradient, rtol=0, atol=0)
