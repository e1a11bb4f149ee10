"""Weights that serve, are stashed and step, on a real stage of a tiny model."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW, NAdam, Optimizer

from services.stage_worker.compute.weights import StageWeights, WeightsVersion
from services.stage_worker.settings import OptimizerName
from services.stage_worker.training.optimizers import OptimizerSettings
from shared.errors import LemixError, VersionGoneError
from shared.model.attention import PackedSegments
from shared.model.fast_inference import enable_fast_inference
from shared.model.loader import load_stage, model_partition, read_config
from shared.model.lora import ALL_LINEAR, LoraSettings, add_adapter
from shared.model.stage import Stage
from shared.schedule import StashingName
from tests.support.models import VOCAB_SIZE, save_tiny_model
from tests.support.training import training_forward

RATE = 1e-2
SETTINGS = OptimizerSettings(epsilon=1e-3, weight_decay=0.01)
TEXTS = [[1, 5, 9, 2], [7, 7, 3], [90, 12, 33, 4, 6], [2, 3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model("llama_tied", path)
    return path


@pytest.fixture
def stage(folder: Path) -> Stage:
    (layers,) = model_partition(read_config(folder), 1)
    return load_stage(folder, layers)


@pytest.fixture
def weights(stage: Stage) -> StageWeights:
    return StageWeights(stage, SETTINGS, version=0)


def loss_of(stage: Stage, text: list[int]) -> Tensor:
    tokens = torch.tensor(text)
    logits = stage.forward(tokens, torch.arange(len(text)), PackedSegments((len(text),)))
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum")


@torch.no_grad()
def logits_of(stage: Stage) -> Tensor:
    tokens = torch.tensor(TEXTS[0])
    return stage.forward(tokens, torch.arange(len(tokens)), PackedSegments((len(tokens),)))


class InFlight:
    """A microbatch after its forward."""

    def __init__(self, stage: Stage, weights: StageWeights, text: list[int]) -> None:
        self._weights = weights
        with training_forward(weights) as self.version:
            self._loss = loss_of(stage, text)

    def backward(self) -> None:
        torch.autograd.backward(self._loss)
        self._weights.backward_done(self.version)


def train(stage: Stage, weights: StageWeights, batch_id: str, texts: Iterable[list[int]]) -> None:
    for text in texts:
        InFlight(stage, weights, text).backward()
    weights.finish_batch(batch_id)
    weights.step(batch_id, RATE, version=weights.version + 1)


def values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def newest(stage: Stage) -> dict[str, Tensor]:
    return values(dict(stage.named_tensors()))


def places(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5)


def plain_gradients(stage: Stage, texts: Iterable[list[int]]) -> dict[str, Tensor]:
    """What autograd says without any stashing."""
    parameters = stage.named_tensors()
    loss = torch.stack([loss_of(stage, text) for text in texts]).sum()
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def leaves(version: WeightsVersion) -> dict[str, Tensor]:
    return dict(version.leaves)


def test_stashing_costs_no_memory(stage: Stage, weights: StageWeights) -> None:
    first, second = InFlight(stage, weights, TEXTS[0]), InFlight(stage, weights, TEXTS[1])
    assert first.version is second.version
    assert places(first.version.leaves.values()) == places(stage.parameters())


def test_gradients_equal_plain_autograd(stage: Stage, weights: StageWeights) -> None:
    expected = plain_gradients(stage, TEXTS[:3])
    for text in TEXTS[:3]:
        InFlight(stage, weights, text).backward()
    assert_close(weights.finish_batch("b"), expected)


def test_a_step_with_nothing_in_flight_stays_in_place(stage: Stage, weights: StageWeights) -> None:
    before, where = newest(stage), places(stage.parameters())
    train(stage, weights, "b", TEXTS[:2])
    assert places(stage.parameters()) == where
    assert weights.version == 1
    assert not torch.equal(newest(stage)["model.norm.weight"], before["model.norm.weight"])


def plain_adamw(parameters: Iterable[Tensor]) -> Optimizer:
    return AdamW(parameters, lr=RATE, betas=(0.9, 0.95), eps=SETTINGS.epsilon, weight_decay=0.01)


def plain_nadamw(parameters: Iterable[Tensor]) -> Optimizer:
    return NAdam(
        parameters,
        lr=RATE,
        betas=(0.99, 0.95),
        eps=SETTINGS.epsilon,
        weight_decay=0.01,
        decoupled_weight_decay=True,
    )


@pytest.mark.parametrize(("name", "plain_optimizer"), [("adamw", plain_adamw), ("nadamw", plain_nadamw)])
def test_steps_equal_the_plain_optimizer(
    name: OptimizerName, plain_optimizer: Callable[..., Optimizer], folder: Path, stage: Stage
) -> None:
    weights = StageWeights(stage, replace(SETTINGS, name=name), version=0)
    plain = load_stage(folder, stage.layers)
    optimizer = plain_optimizer(plain.parameters())
    for number, text in enumerate(TEXTS):
        train(stage, weights, f"b{number}", [text])
        torch.autograd.backward(loss_of(plain, text))
        optimizer.step()
        optimizer.zero_grad()
    assert weights.version == len(TEXTS)
    assert_close(newest(stage), newest(plain))


def test_a_step_leaves_the_weights_of_microbatches_in_flight_as_they_were(
    stage: Stage, weights: StageWeights
) -> None:
    old = newest(stage)
    expected = plain_gradients(stage, [TEXTS[1]])
    first = InFlight(stage, weights, TEXTS[0])
    later = InFlight(stage, weights, TEXTS[1])
    first.backward()
    weights.finish_batch("b0")
    weights.step("b0", RATE, version=1)
    assert_same(values(leaves(later.version)), old)
    stepped = newest(stage)
    assert not torch.equal(stepped["model.norm.weight"], old["model.norm.weight"])
    newer = InFlight(stage, weights, TEXTS[2])
    assert (later.version.number, newer.version.number) == (0, 1)
    assert_same(values(leaves(newer.version)), stepped)
    later.backward()
    assert_close(weights.finish_batch("b1"), expected)
    weights.step("b1", RATE, version=2)
    assert_same(values(leaves(newer.version)), stepped)


def test_a_step_is_a_write_that_torch_counts(stage: Stage, weights: StageWeights) -> None:
    """Copies of weights that were made before it are known to be stale by that."""
    before = {name: tensor._version for name, tensor in stage.trainable_tensors().items()}
    train(stage, weights, "b", TEXTS[:1])
    after = stage.trainable_tensors()
    assert all(after[name]._version > version for name, version in before.items())


def test_gradients_of_a_batch_over_two_versions_add_up(stage: Stage, weights: StageWeights) -> None:
    old = plain_gradients(stage, [TEXTS[1]])
    first, second = InFlight(stage, weights, TEXTS[0]), InFlight(stage, weights, TEXTS[1])
    first.backward()
    weights.finish_batch("b0")
    weights.step("b0", RATE, version=1)
    new = plain_gradients(stage, [TEXTS[2]])
    third = InFlight(stage, weights, TEXTS[2])
    second.backward()
    third.backward()
    assert_close(weights.finish_batch("b1"), {name: old[name] + new[name] for name in old})


def test_a_batch_keeps_what_went_backward_before_the_step_of_its_predecessor(
    stage: Stage, weights: StageWeights
) -> None:
    """A stage with a tied embedding waits for the other end, and meanwhile the next batch goes backward."""
    old = plain_gradients(stage, [TEXTS[1]])
    InFlight(stage, weights, TEXTS[0]).backward()
    weights.finish_batch("b0")
    InFlight(stage, weights, TEXTS[1]).backward()
    weights.step("b0", RATE, version=1)
    new = plain_gradients(stage, [TEXTS[2]])
    InFlight(stage, weights, TEXTS[2]).backward()
    assert_close(weights.finish_batch("b1"), {name: old[name] + new[name] for name in old})


def test_without_stashing_a_step_changes_the_weights_of_microbatches_in_flight(
    folder: Path, stage: Stage
) -> None:
    weights = StageWeights(stage, SETTINGS, version=0, stashing="none")
    first, later = InFlight(stage, weights, TEXTS[0]), InFlight(stage, weights, TEXTS[1])
    where = places(stage.parameters())
    first.backward()
    weights.finish_batch("b0")
    weights.step("b0", RATE, version=1)
    assert places(stage.parameters()) == where
    assert_same(values(leaves(later.version)), newest(stage))
    on_time = plain_gradients(load_stage(folder, stage.layers), [TEXTS[1]])
    later.backward()
    wrong = weights.finish_batch("b1")
    name = "model.layers.0.mlp.down_proj.weight"
    assert (wrong[name] - on_time[name]).norm() > 0.01 * on_time[name].norm()


def test_double_stashing_refuses_a_third_version(stage: Stage) -> None:
    weights = StageWeights(stage, SETTINGS, version=0, stashing="double")
    oldest = InFlight(stage, weights, TEXTS[0])
    for number in range(2):
        current, ahead = InFlight(stage, weights, TEXTS[1]), InFlight(stage, weights, TEXTS[2])
        current.backward()
        weights.finish_batch(f"b{number}")
        if number == 0:
            weights.step("b0", RATE, version=1)
            ahead.backward()
    with pytest.raises(LemixError, match="version 1 while microbatches of version 0 are in flight"):
        weights.step("b1", RATE, version=2)
    assert oldest.version.number == 0


@pytest.mark.parametrize("stashing", ["full", "double"])
def test_memory_of_retired_versions_is_used_again(stage: Stage, stashing: StashingName) -> None:
    weights = StageWeights(stage, SETTINGS, version=0, stashing=stashing)
    seen = set()
    ahead = InFlight(stage, weights, TEXTS[0])
    for number in range(6):
        current, ahead = ahead, InFlight(stage, weights, TEXTS[number % 4])
        current.backward()
        weights.finish_batch(f"b{number}")
        weights.step(f"b{number}", RATE, version=number + 1)
        seen.add(tuple(places(stage.parameters())))
    assert len(seen) == 2  # that of the newest and that of the one in flight take turns


def test_serving_sees_the_newest_weights_between_training_forwards(
    stage: Stage, weights: StageWeights
) -> None:
    parameters = stage.parameters()
    with training_forward(weights) as version:
        assert stage.parameters() == list(version.leaves.values())
    assert all(one is other for one, other in zip(stage.parameters(), parameters, strict=True))


def of_kind(kind: str, stage: Stage, **options: Any) -> StageWeights:
    """Of the whole stage in float32 or bfloat16, or of an adapter."""
    if kind == "lora":
        add_adapter(stage, LoraSettings(rank=4, alpha=12, targets=(ALL_LINEAR,)))
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    return StageWeights(stage, SETTINGS, version=0, dtype=dtype, **options)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "lora"])
def test_a_kept_version_serves_on_while_the_weights_step(kind: str, stage: Stage) -> None:
    weights = of_kind(kind, stage)
    old, served = newest(stage), places(stage.parameters())
    weights.keep()
    with weights.serving(0):
        assert places(stage.parameters()) == served, "keeping costs no memory"
    for number in range(3):
        train(stage, weights, f"b{number}", TEXTS[number : number + 1])
        stepped = newest(stage)
        with weights.serving(0):
            assert_same(newest(stage), old)
        assert_same(newest(stage), stepped)
    trained = stage.trainable_tensors()
    assert not any(torch.equal(stepped[name], old[name]) for name in trained)
    for name, master in weights.master_tensors().items():
        assert torch.equal(stepped[name], master.to(stepped[name].dtype)), name


@pytest.mark.parametrize("is_stale", [False, True])
def test_a_kept_version_has_the_copies_of_the_weights_that_it_was(is_stale: bool, stage: Stage) -> None:
    weights, packed = StageWeights(stage, SETTINGS, version=0), enable_fast_inference(stage)
    packed.prepare()
    copied = logits_of(stage)
    if is_stale:
        others = {name: 1.1 * tensor.detach() for name, tensor in weights.master_tensors().items()}
        weights.load(others, {}, version=1)
    kept = weights.version
    with packed.moving_to(weights.serving(kept)):
        weights.keep()
    with weights.serving(kept):
        assert {product.is_current for product in packed.products} == {not is_stale}
        served = logits_of(stage)
        assert torch.equal(served, copied) is not is_stale
    train(stage, weights, "b1", TEXTS[1:2])
    with weights.serving(kept):
        torch.testing.assert_close(logits_of(stage), served, rtol=1e-5, atol=1e-5)
    assert not any(product.is_current for product in packed.products), "the newest have stepped"


def test_kept_versions_change_neither_steps_nor_gradients(folder: Path, stage: Stage) -> None:
    plain_stage = load_stage(folder, stage.layers)
    plain = StageWeights(plain_stage, SETTINGS, version=0)
    kept = StageWeights(stage, SETTINGS, version=0)
    for number, text in enumerate(TEXTS):
        kept.keep()
        train(stage, kept, f"b{number}", [text])
        train(plain_stage, plain, f"b{number}", [text])
        if number > 1:
            kept.release(number - 1)
    assert_same(newest(stage), newest(plain_stage))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "lora"])
def test_memory_of_released_versions_is_used_again(kind: str, stage: Stage) -> None:
    weights, seen = of_kind(kind, stage), set()
    for number in range(8):
        weights.keep()
        train(stage, weights, f"b{number}", TEXTS[:1])
        weights.release(number)
        seen.add(tuple(places(stage.parameters())))
    assert len(seen) == 2  # that of the newest and that of the kept one take turns


def test_memory_in_which_a_kept_version_lies_is_not_used_again(stage: Stage) -> None:
    """Without stashing a step leaves version 0's memory to version 1, which is kept there."""
    weights = StageWeights(stage, SETTINGS, version=0, stashing="none")
    late = InFlight(stage, weights, TEXTS[0])
    train(stage, weights, "b0", TEXTS[1:2])
    kept = newest(stage)
    weights.keep()
    train(stage, weights, "b1", TEXTS[2:3])
    late.backward()
    weights.finish_batch("late")
    weights.keep()
    train(stage, weights, "b2", TEXTS[3:])
    with weights.serving(1):
        assert_same(newest(stage), kept)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "lora"])
def test_a_version_that_is_kept_again_says_whether_it_is_the_same(kind: str, stage: Stage) -> None:
    weights = of_kind(kind, stage)
    saved = values(dict(weights.master_tensors()))
    train(stage, weights, "b0", TEXTS[:1])
    others = values(dict(weights.master_tensors()))
    weights.load(saved, {}, version=0)
    assert weights.keep()
    expected = newest(stage)
    train(stage, weights, "b1", TEXTS[1:2])

    weights.load(saved, {}, version=0)
    assert weights.keep()
    train(stage, weights, "b2", TEXTS[2:3])
    with weights.serving(0):
        assert_same(newest(stage), expected)

    weights.load(others, {}, version=0)
    assert not weights.keep()
    expected = newest(stage)
    train(stage, weights, "b3", TEXTS[3:])
    with weights.serving(0):
        assert_same(newest(stage), expected)


def test_a_version_that_is_not_kept_is_gone(stage: Stage, weights: StageWeights) -> None:
    weights.keep()
    train(stage, weights, "b0", TEXTS[:1])
    with weights.serving(1):
        pass  # the newest needs no keeping
    weights.release(0)
    with pytest.raises(VersionGoneError, match="version 0 is gone"), weights.serving(0):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_version_serves_on_while_others_are_loaded_and_trained(
    stage: Stage, dtype: torch.dtype
) -> None:
    weights = StageWeights(stage, SETTINGS, version=3, dtype=dtype)
    kept = newest(stage)
    weights.keep()
    InFlight(stage, weights, TEXTS[0]).backward()
    other = {name: master + 1 for name, master in values(dict(weights.master_tensors())).items()}

    weights.load(other, {}, version=7)
    assert_same(values(dict(weights.master_tensors())), other)
    train(stage, weights, "b", TEXTS[1:])

    with weights.serving(3):
        assert_same(newest(stage), kept)
    weights.release(3)
    with pytest.raises(VersionGoneError), weights.serving(3):
        pass


def test_a_forward_that_raises_leaves_the_newest_weights_in_place(
    stage: Stage, weights: StageWeights
) -> None:
    parameters = stage.parameters()
    with pytest.raises(IndexError), training_forward(weights) as version:
        loss_of(stage, [VOCAB_SIZE, 1])
    assert all(one is other for one, other in zip(stage.parameters(), parameters, strict=True))
    assert version.num_in_flight == 0


def test_another_ends_gradient_is_added_before_the_step(stage: Stage, weights: StageWeights) -> None:
    name = stage.tied_embedding_name
    assert name is not None
    InFlight(stage, weights, TEXTS[0]).backward()
    total = weights.finish_batch("b")
    expected = total[name] + 1.0
    weights.add_gradient("b", name, torch.ones_like(expected))
    assert torch.equal(total[name], expected)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("adamw", {"step", "exp_avg", "exp_avg_sq"}),
        ("nadamw", {"step", "mu_product", "exp_avg", "exp_avg_sq"}),
    ],
)
def test_weights_and_optimizer_state_come_back(
    name: OptimizerName, kinds: set[str], folder: Path, stage: Stage
) -> None:
    settings = replace(SETTINGS, name=name)
    weights = StageWeights(stage, settings, version=0)
    train(stage, weights, "b0", TEXTS[:1])
    train(stage, weights, "b1", TEXTS[1:2])
    saved, state = newest(stage), values(weights.optimizer_state())
    assert {key.partition(".")[0] for key in state} == kinds
    train(stage, weights, "b2", TEXTS[2:])
    undisturbed = newest(stage)

    other = load_stage(folder, stage.layers)
    restored = StageWeights(other, settings, version=0)
    train(other, restored, "x", TEXTS)
    restored.load(saved, state, version=2)
    assert restored.version == 2
    assert_same(newest(other), saved)
    assert_same(values(restored.optimizer_state()), state)
    train(other, restored, "b2", TEXTS[2:])
    assert_same(newest(other), undisturbed)


def test_loading_forgets_all_training_in_progress(stage: Stage, weights: StageWeights) -> None:
    saved = newest(stage)
    lost = InFlight(stage, weights, TEXTS[0])
    InFlight(stage, weights, TEXTS[1]).backward()
    weights.load(saved, {}, version=7)
    lost.backward()
    assert weights.optimizer_state() == {}
    expected = plain_gradients(stage, [TEXTS[2]])
    InFlight(stage, weights, TEXTS[2]).backward()
    assert_close(weights.finish_batch("b"), expected)
    weights.step("b", RATE, version=8)
    assert weights.version == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_take_their_place_without_a_copy_and_old_versions_keep_theirs(
    stage: Stage, dtype: torch.dtype
) -> None:
    weights = StageWeights(stage, SETTINGS, version=0, dtype=dtype)
    train(stage, weights, "b0", TEXTS[:1])
    weights.keep()
    in_flight = InFlight(stage, weights, TEXTS[1])
    before = values(leaves(in_flight.version))
    others = {name: master.detach() + 1 for name, master in weights.master_tensors().items()}
    state = {key: value.clone() for key, value in weights.optimizer_state().items()}
    weights.replace(others, state, version=9)

    assert weights.version == 9
    assert places(weights.master_tensors().values()) == places(others.values())
    assert places(weights.optimizer_state().values()) == places(state.values())
    assert_same(newest(stage), {name: value.to(dtype) for name, value in others.items()})
    assert_same(values(leaves(in_flight.version)), before)
    with weights.serving(1):
        assert_same(newest(stage), before)
    in_flight.backward()
    train(stage, weights, "b1", TEXTS[2:])
    assert weights.version == 10


@pytest.mark.parametrize("name", ["adamw", "nadamw"])
def test_an_optimizer_without_any_state_has_the_layout_of_one_with_it(
    name: OptimizerName, stage: Stage
) -> None:
    weights = StageWeights(stage, replace(SETTINGS, name=name), version=0)
    empty = values(weights.complete_optimizer_state())
    assert weights.optimizer_state() == {}
    train(stage, weights, "b0", TEXTS[:1])
    full = weights.complete_optimizer_state()
    assert_same(full, weights.optimizer_state())
    assert {key: value.shape for key, value in empty.items()} == {
        key: value.shape for key, value in full.items()
    }
    weights.load(newest(stage), empty, version=0)
    train(stage, weights, "b1", TEXTS[:1])


@pytest.mark.parametrize("stashing", ["full", "double", "none"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "lora"])
def test_weights_that_must_stay_in_place_do(kind: str, stashing: StashingName, stage: Stage) -> None:
    weights = of_kind(kind, stage, stashing=stashing, in_place=True)
    where = places(stage.parameters())
    weights.keep()
    kept, loaded = newest(stage), values(dict(weights.master_tensors()))
    first, ahead = InFlight(stage, weights, TEXTS[0]), InFlight(stage, weights, TEXTS[1])
    first.backward()
    weights.finish_batch("b0")
    weights.step("b0", RATE, version=1)
    ahead.backward()
    weights.finish_batch("b1")
    weights.step("b1", RATE, version=2)
    mean = values(dict(weights.master_tensors()))
    weights.replace(mean, values(weights.optimizer_state()), version=3)
    train(stage, weights, "b3", TEXTS[2:])
    with weights.serving(0):
        assert_same(newest(stage), kept)
        assert not {*places(stage.trainable_tensors().values())} & {*where}
    weights.load(loaded, {}, version=5)
    assert places(stage.parameters()) == where
    assert_same(newest(stage), kept)


def test_weights_in_place_train_to_the_same(folder: Path, stage: Stage) -> None:
    stages = [stage, load_stage(folder, stage.layers)]
    both = [StageWeights(one, SETTINGS, version=0, in_place=place == 0) for place, one in enumerate(stages)]
    for one, weights in zip(stages, both, strict=True):
        ahead = InFlight(one, weights, TEXTS[0])
        for number in range(6):
            current, ahead = ahead, InFlight(one, weights, TEXTS[number % 4])
            current.backward()
            weights.finish_batch(f"b{number}")
            weights.step(f"b{number}", RATE, version=number + 1)
    assert_same(newest(stages[0]), newest(stages[1]))
