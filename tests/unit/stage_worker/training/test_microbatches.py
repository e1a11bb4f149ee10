"""Gradients are the same wherever a forward keeps what its backward needs, and in however many slices."""

from pathlib import Path

import pytest
import torch
from msgspec import structs
from torch import Tensor
from torch.profiler import profile
from transformers import LlamaConfig, LlamaForCausalLM

from services.stage_worker.compute.slices import finish
from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.training.microbatches import MicrobatchRunner
from services.stage_worker.training.optimizers import OptimizerSettings
from services.stage_worker.training.preferences import Reference
from shared.messages.training import Microbatch
from shared.model.loader import load_stage, model_partition, read_config
from tests.support.models import FAMILIES, save_tiny_model

LENGTHS = (3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model("llama", path)
    return path


def runner_of(
    folder: Path, stage: int, *, checkpointing: bool, num_slices: int = 1
) -> tuple[MicrobatchRunner, StageWeights]:
    stage_of = load_stage(folder, model_partition(read_config(folder), 2)[stage])
    weights = StageWeights(stage_of, OptimizerSettings(), version=0)
    runner = MicrobatchRunner(
        stage_of,
        weights,
        torch.device("cpu"),
        reference=Reference(dict),
        num_slices=num_slices,
        checkpointing=checkpointing,
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


def trained(
    folder: Path, stage: int, *, offload: bool, checkpointing: bool, num_slices: int = 1
) -> list[dict[str, Tensor]]:
    """Gradients of two batches: the second one's forward precedes the first one's step."""
    runner, weights = runner_of(folder, stage, checkpointing=checkpointing, num_slices=num_slices)
    inputs = torch.arange(sum(LENGTHS)) if stage == 0 else torch.linspace(-1, 1, 7 * 32).view(7, 32).sin()
    outputs = {}
    for batch_id in ("a", "b"):
        sent = microbatch(batch_id, offload=offload, backward_after_all=True)
        _, outputs[batch_id] = finish(runner.forward(sent, inputs.clone()))
    gradients = []
    for batch_id in ("a", "b"):
        of_outputs = torch.ones_like(outputs[batch_id]) if stage == 0 else None
        of_inputs = finish(runner.backward(batch_id, 0, of_outputs))
        found = weights.finish_batch(batch_id)
        gradients.append({name: gradient.clone() for name, gradient in found.items()})
        if of_inputs is not None:
            gradients[-1]["inputs"] = of_inputs
        weights.step(batch_id, 0.1, version=weights.version + 1)
    return gradients


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("num_slices", [1, 2])
@pytest.mark.parametrize(
    ("offload", "checkpointing"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_gradients_depend_neither_on_where_activations_are_kept_nor_on_slices(
    offload: bool, checkpointing: bool, num_slices: int, stage: int, folder: Path
) -> None:
    plain = trained(folder, stage, offload=False, checkpointing=False)
    other = trained(folder, stage, offload=offload, checkpointing=checkpointing, num_slices=num_slices)
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
        finish(runner.forward(microbatch("a", (64,), **changes), inputs))
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


@pytest.mark.parametrize("beta", [None, 0.3])
def test_a_large_head_runs_on_some_of_its_rows_after_the_others(beta: float | None, tmp_path: Path) -> None:
    """The sums over rows are then taken in another order."""
    shape = FAMILIES["llama"][1].to_dict() | {"vocab_size": 640, "intermediate_size": 8}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path)
    inputs = torch.linspace(-1, 1, 7 * 32).view(7, 32).sin()
    sent = structs.replace(microbatch("a"), label_rows=(1, 2, 3, 5, 6), labels=(7, 8, 9, 10, 11), beta=beta)
    found = []
    for num_slices in (1, 2):
        runner, weights = runner_of(tmp_path, 1, checkpointing=False, num_slices=num_slices)
        reference = finish(runner.reference(sent, inputs.clone())) - 0.1 if beta else None
        _, loss = finish(runner.forward(sent, inputs.clone(), reference))
        of_inputs = finish(runner.backward("a", 0, None))
        assert of_inputs is not None
        found.append({"loss": loss, "inputs": of_inputs} | weights.finish_batch("a"))
    assert runner.num_slices >= 2 + 3
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)
