"""Wherever a forward keeps what its backward needs, the gradients are the same, steps in between included."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.training.microbatches import MicrobatchRunner
from services.stage_worker.training.optimizers import OptimizerSettings
from services.stage_worker.training.preferences import Reference
from shared.messages.training import Microbatch
from shared.model.loader import load_stage, model_partition, read_config
from tests.support.models import save_tiny_model

LENGTHS = (3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model("llama", path)
    return path


def runner_of(folder: Path, stage: int, *, checkpointing: bool) -> tuple[MicrobatchRunner, StageWeights]:
    stage_of = load_stage(folder, model_partition(read_config(folder), 2)[stage])
    weights = StageWeights(stage_of, OptimizerSettings(), version=0)
    runner = MicrobatchRunner(
        stage_of, weights, torch.device("cpu"), reference=Reference(dict), checkpointing=checkpointing
    )
    return runner, weights


def microbatch(batch_id: str, lengths: tuple[int, ...] = LENGTHS, **changes: bool) -> Microbatch:
    rows = tuple(range(lengths[0] - 1))
    return Microbatch(
        fence=1,
        batch_id=batch_id,
        index=0,
        count=1,
        lengths=lengths,
        label_rows=rows,
        labels=rows,
        loss_weight=1.0,
        **changes,
    )


def trained(folder: Path, stage: int, *, offload: bool, checkpointing: bool) -> list[dict[str, Tensor]]:
    """Gradients of two batches: the second one's forward precedes the first one's step."""
    runner, weights = runner_of(folder, stage, checkpointing=checkpointing)
    inputs = torch.arange(sum(LENGTHS)) if stage == 0 else torch.linspace(-1, 1, 7 * 32).view(7, 32).sin()
    outputs = {}
    for batch_id in ("a", "b"):
        sent = microbatch(batch_id, offload=offload, backward_after_all=True)
        _, outputs[batch_id] = runner.forward(sent, inputs.clone())
    gradients = []
    for batch_id in ("a", "b"):
        of_inputs = runner.backward(batch_id, 0, torch.ones_like(outputs[batch_id]) if stage == 0 else None)
        found = weights.finish_batch(batch_id)
        gradients.append({name: gradient.clone() for name, gradient in found.items()})
        if of_inputs is not None:
            gradients[-1]["inputs"] = of_inputs
        weights.step(batch_id, 0.1, version=weights.version + 1)
    return gradients


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(("offload", "checkpointing"), [(True, False), (False, True), (True, True)])
def test_gradients_do_not_depend_on_where_activations_are_kept(
    offload: bool, checkpointing: bool, stage: int, folder: Path
) -> None:
    plain = trained(folder, stage, offload=False, checkpointing=False)
    other = trained(folder, stage, offload=offload, checkpointing=checkpointing)
    assert len(plain) == len(other) == 2
    for expected, got in zip(plain, other, strict=True):
        assert expected.keys() == got.keys()
        for name, gradient in expected.items():
            assert gradient.abs().sum() > 0 or "bias" in name
            torch.testing.assert_close(got[name], gradient, rtol=0, atol=0)


def kept_bytes(folder: Path, stage: int, *, checkpointing: bool, **changes: bool) -> int:
    """What a forward allocates and does not free, by torch's own count."""
    runner, _ = runner_of(folder, stage, checkpointing=checkpointing)
    inputs = torch.zeros(64, dtype=torch.int64) if stage == 0 else torch.zeros(64, 32)
    with profile(profile_memory=True) as profiled:
        runner.forward(microbatch("a", (64,), **changes), inputs)
    return sum(event.self_cpu_memory_usage for event in profiled.events())


def test_checkpointing_keeps_a_fraction_of_the_activations(folder: Path) -> None:
    plain, recomputed = (kept_bytes(folder, 0, checkpointing=on) for on in (False, True))
    assert recomputed < plain / 10


def test_a_last_stage_that_turns_at_once_recomputes_nothing(folder: Path) -> None:
    kept = {
        waits: [kept_bytes(folder, 1, checkpointing=on, backward_after_all=waits) for on in (False, True)]
        for waits in (False, True)
    }
    assert kept[False][1] == pytest.approx(kept[False][0], rel=0.02)
    assert kept[True][1] < kept[True][0] / 10
