from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.model import products
from shared.model.attention import PackedSegments
from shared.model.fast_inference import InferenceWeights, enable_fast_inference
from shared.model.loader import load_stage
from shared.model.partition import partition
from shared.model.products import Copies, Product, Workshop
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
    assert weights.products
    weights.prepare()
    torch.testing.assert_close(logits(stage), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("swap", [False, True], ids=["in-place", "swapped"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_changed_weights_are_noticed(family: str, swap: bool, model_folder: Callable[[str], Path]) -> None:
    stage, weights = fast_stage(model_folder(family))
    reference = load_stage(model_folder(family), partition(5, 1)[0])
    weights.prepare()
    logits(stage)
    for name, parameter in stage.named_tensors().items():
        if swap:
            stage.set_parameter(name, torch.nn.Parameter(parameter.detach() * 1.1))
        else:
            with torch.no_grad():
                parameter.mul_(1.1)
        reference.set_parameter(name, stage.parameter(name))
    for _ in range(7):  # plain at first, and from copies again later
        torch.testing.assert_close(logits(stage), logits(reference), rtol=1e-4, atol=1e-5)


def test_an_iteration_without_a_row_of_logits_has_none(model_folder: Callable[[str], Path]) -> None:
    stage, weights = fast_stage(model_folder("llama"))
    weights.prepare()
    tokens, no_rows = torch.arange(9), torch.tensor([], dtype=torch.int64)
    with torch.no_grad():
        assert len(stage.forward(tokens, tokens, PackedSegments((9,)), no_rows)) == 0


def test_weights_written_unseen_need_to_be_invalidated(model_folder: Callable[[str], Path]) -> None:
    stage, weights = fast_stage(model_folder("llama"))
    weights.prepare()
    before = logits(stage)
    stage.parameter("model.layers.2.mlp.down_proj.weight").data.mul_(2.0)
    assert torch.equal(logits(stage), before)
    weights.invalidate()
    assert not torch.allclose(logits(stage), before)


class AtOnce(Workshop):
    """Has no thread."""

    def submit(self, work: Callable[[], Copies]) -> Future[Copies]:
        done: Future[Copies] = Future()
        done.set_result(work())
        return done


class Later(Workshop):
    """Works when it is told to."""

    def __init__(self) -> None:
        self._submitted: list[tuple[Callable[[], Copies], Future[Copies]]] = []

    def submit(self, work: Callable[[], Copies]) -> Future[Copies]:
        done: Future[Copies] = Future()
        self._submitted.append((work, done))
        return done

    def work(self) -> None:
        work, done = self._submitted.pop()
        done.set_result(work())


def test_fresh_weights_are_copied_only_after_some_calls() -> None:
    module = torch.nn.Linear(8, 8)
    product = Product([module], AtOnce(), patience_calls=2)
    assert [product.ready() for _ in range(5)] == [False, False, False, True, True]
    with torch.no_grad():
        module.weight.mul_(2.0)
    assert [product.ready() for _ in range(4)] == [False, False, False, True]


def test_weights_that_change_while_they_are_copied_are_copied_again() -> None:
    module = torch.nn.Linear(8, 8)

    class Changing(AtOnce):
        def submit(self, work: Callable[[], Copies]) -> Future[Copies]:
            done = super().submit(work)
            if module.weight._version < 1:
                with torch.no_grad():
                    module.weight.mul_(2.0)
            return done

    product, inputs = Product([module], Changing(), patience_calls=0), torch.ones(2, 8)
    while not product.ready():
        pass
    assert module.weight._version == 1
    torch.testing.assert_close(product(inputs), module(inputs))


def test_copies_have_the_bias_of_their_weights_whatever_the_module_runs_with_meanwhile() -> None:
    module, workshop = torch.nn.Linear(8, 8), Later()
    bias, other = module.bias, torch.nn.Parameter(torch.full((8,), 9.0))
    product, inputs = Product([module], workshop, patience_calls=0), torch.ones(2, 8)
    assert not product.ready()
    module.bias = other
    workshop.work()
    module.bias = bias
    assert product.ready()
    torch.testing.assert_close(product(inputs), module(inputs))


def test_what_is_being_copied_when_all_copies_are_forgotten_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fused optimizer's step is not counted by torch: the stage forgets the copies instead."""
    module, workshop = torch.nn.Linear(8, 8), Later()
    product, inputs = Product([module], workshop, patience_calls=0), torch.ones(2, 8)
    assert not product.ready()
    copied = products._copies

    def overtaken_by_a_step(*args: Any) -> Copies:
        copies = copied(*args)
        module.weight.data.mul_(2.0)
        product.invalidate()
        return copies

    with monkeypatch.context() as during_the_step:
        during_the_step.setattr(products, "_copies", overtaken_by_a_step)
        workshop.work()
    assert not product.ready()
    workshop.work()
    assert product.ready()
    torch.testing.assert_close(product(inputs), module(inputs))


def test_two_versions_in_turn_leave_the_copies_of_one_as_they_are() -> None:
    module = torch.nn.Linear(8, 8)
    product, weights = Product([module], AtOnce()), [module.weight, torch.nn.Parameter(torch.ones(8, 8))]
    product.prepare()
    before = product.layouts
    for _ in range(9):
        for number, weight in enumerate(weights):
            module.weight = weight
            assert product.ready() == (number == 0)
    assert all(one is other for one, other in zip(product.layouts, before, strict=True))


@pytest.mark.parametrize("num_rows", [1, 3, 8, 70])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_modules(num_rows: int, bias: bool) -> None:
    modules = [torch.nn.Linear(16, 24, bias=bias), torch.nn.Linear(16, 8, bias=bias)]
    product, inputs = Product(modules, Workshop()), torch.randn(1, num_rows, 16)
    product.prepare()
    expected = torch.cat([module(inputs) for module in modules], -1)
    torch.testing.assert_close(product(inputs), expected)


def test_stages_in_other_dtypes_are_left_alone(model_folder: Callable[[str], Path]) -> None:
    stage = load_stage(model_folder("llama"), partition(5, 1)[0], dtype=torch.float64)
    assert enable_fast_inference(stage).products == ()
