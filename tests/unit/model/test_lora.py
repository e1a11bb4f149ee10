"""Adapters on the stages of tiny models, against whole models that peft or the test has merged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from shared.errors import ConfigurationError
from shared.model.attention import PackedSegments
from shared.model.fast_inference import enable_fast_inference
from shared.model.loader import in_published_names, load_stage
from shared.model.lora import (
    ALL_LINEAR,
    LoraSettings,
    adapter_config,
    add_adapter,
    in_adapter_names,
    initial_adapter,
    merged_state_dict,
    read_adapter,
)
from shared.model.partition import partition
from shared.model.stage import Stage
from tests.unit.model.conftest import FAMILIES

RANK, ALPHA = 4, 12
TOKENS = torch.arange(9)
Folder = Callable[[str], Path]


def settings(*targets: str) -> LoraSettings:
    return LoraSettings(rank=RANK, alpha=ALPHA, targets=targets or (ALL_LINEAR,))


def adapted_stages(folder: Path, num_stages: int) -> list[Stage]:
    """As they begin."""
    stages = [load_stage(folder, layers) for layers in partition(5, num_stages)]
    for stage in stages:
        add_adapter(stage, settings())
    return stages


@torch.no_grad()
def randomise(stages: list[Stage]) -> None:
    """As training would: B starts at 0, which would hide everything."""
    generator = torch.Generator().manual_seed(3)
    for stage in stages:
        for name in stage.adapter_names:
            parameter = stage.parameter(name)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@torch.no_grad()
def logprobs(stages: list[Stage]) -> Tensor:
    rows = TOKENS
    for stage in stages:
        rows = stage.forward(rows, TOKENS, PackedSegments((len(TOKENS),)))
    return rows.log_softmax(-1)


@torch.no_grad()
def logprobs_of(model: Any) -> Tensor:
    result: Tensor = model(TOKENS[None]).logits[0].log_softmax(-1)
    return result


def peft_model(model: Any, stages: list[Stage]) -> Any:
    """The whole model with the stages' adapter, as peft reads it, from what is saved of it."""
    wrapped = get_peft_model(model, adapter_config(stages[0], model.name_or_path))
    saved = {
        name: tensor
        for stage in stages
        for name, tensor in in_adapter_names(stage.trainable_tensors()).items()
    }
    result: Any = set_peft_model_state_dict(wrapped, saved)
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora_" in name]
    return wrapped.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing(
    family: str, model_folder: Folder, whole_model: Callable[..., Any]
) -> None:
    stages = adapted_stages(model_folder(family), 2)
    torch.testing.assert_close(logprobs(stages), logprobs_of(whole_model(family)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gpt2"])
def test_what_is_served_is_the_merged_model(
    family: str, num_stages: int, model_folder: Folder, whole_model: Callable[..., Any]
) -> None:
    stages = adapted_stages(model_folder(family), num_stages)
    before = logprobs(stages)
    randomise(stages)
    plain = logprobs(stages)
    for stage in stages:
        enable_fast_inference(stage).prepare()
    merged = peft_model(whole_model(family), stages).merge_and_unload()
    expected = logprobs_of(merged)
    assert not torch.allclose(expected, before, atol=0.1)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logprobs(stages), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gpt2", "gpt-neox"])
def test_all_linear_is_what_peft_takes_it_for(
    family: str, model_folder: Folder, whole_model: Callable[..., Any]
) -> None:
    config = LoraConfig(r=RANK, target_modules=ALL_LINEAR, fan_in_fan_out=family == "gpt2")
    expected = get_peft_model(whole_model(family), config)
    names = {
        name
        for stage in adapted_stages(model_folder(family), 2)
        for name in in_adapter_names(stage.trainable_tensors())
    }
    assert names == set(get_peft_model_state_dict(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_weights_are_the_models_that_peft_merges(
    family: str, model_folder: Folder, whole_model: Callable[..., Any]
) -> None:
    stages = adapted_stages(model_folder(family), 2)
    randomise(stages)
    merged = {name: tensor for stage in stages for name, tensor in merged_state_dict(stage).items()}
    published = {
        name: tensor
        for stage in stages
        for name, tensor in in_published_names(stage, stage.base_tensors()).items()
    }
    assert {name: tensor.shape for name, tensor in merged.items()} == {
        name: tensor.shape for name, tensor in published.items()
    }
    expected = peft_model(whole_model(family), stages).merge_and_unload().state_dict()
    for name in merged.keys() & expected.keys():
        torch.testing.assert_close(merged[name], expected[name], rtol=0, atol=1e-6)
    changed = {name for name in merged if not torch.equal(merged[name], published[name])}
    assert changed == {
        f"{name.removesuffix('.lora_A.weight')}.weight"
        for stage in stages
        for name in stage.adapter_names
        if name.endswith(".lora_A.weight")
    }


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_the_beginning_does_not_depend_on_the_number_of_stages(num_stages: int, model_folder: Folder) -> None:
    (whole,) = adapted_stages(model_folder("llama"), 1)
    split = [initial_adapter(stage) for stage in adapted_stages(model_folder("llama"), num_stages)]
    together = {name: tensor for part in split for name, tensor in part.items()}
    assert together.keys() == set(whole.adapter_names)
    assert all(torch.equal(whole.parameter(name), tensor) for name, tensor in together.items())
    random = [tensor for name, tensor in together.items() if name.endswith("lora_A.weight")]
    assert len({tensor.flatten()[0].item() for tensor in random}) == len(random)


def test_training_the_adapter_leaves_everything_packed(model_folder: Folder) -> None:
    (stage,) = stages = adapted_stages(model_folder("llama"), 1)
    weights = enable_fast_inference(stage)
    weights.prepare()
    copies = [one for product in weights.products for one in product.layouts]
    before = logprobs(stages)
    randomise(stages)
    assert not torch.allclose(logprobs(stages), before)
    assert all(product.ready() for product in weights.products)
    now = [one for product in weights.products for one in product.layouts]
    assert all(one is other for one, other in zip(copies, now, strict=True))


def test_only_the_adapter_trains_and_the_base_stays_where_it_was(model_folder: Folder) -> None:
    stage = load_stage(model_folder("llama-tied"), partition(5, 2)[1])
    base = stage.named_tensors()
    add_adapter(stage, settings())
    assert stage.base_tensors() == base
    assert not any(parameter.requires_grad for parameter in base.values())
    assert stage.trainable_tensors().keys() == stage.named_tensors().keys() - base.keys()
    assert all(parameter.requires_grad for parameter in stage.trainable_tensors().values())
    assert stage.tied_embedding_name is not None
    assert stage.tied_across_stages is None


def test_named_targets_alone_get_an_adapter(model_folder: Folder) -> None:
    stages = [load_stage(model_folder("llama"), partition(5, 1)[0]) for _ in range(2)]
    add_adapter(stages[0], settings("q_proj", "down_proj"))
    targets = {name.split(".")[-3] for name in stages[0].adapter_names}
    assert targets == {"q_proj", "down_proj"}
    assert len(stages[0].adapter_names) == 5 * 2 * 2
    before = logprobs(stages[1:])
    enable_fast_inference(stages[0]).prepare()
    torch.testing.assert_close(logprobs(stages[:1]), before, rtol=0, atol=1e-5)
    randomise(stages[:1])
    assert not torch.allclose(logprobs(stages[:1]), before, atol=0.1)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_porj", "self_attn"])
def test_a_target_that_is_no_linear_module_of_the_layers_is_refused(
    target: str, model_folder: Folder
) -> None:
    stage = load_stage(model_folder("llama"), partition(5, 1)[0])
    with pytest.raises(ConfigurationError, match=f"LoRA targets {target}: no such .* q_proj"):
        add_adapter(stage, settings("k_proj", target))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (LoraSettings(rank=2, alpha=ALPHA, targets=(ALL_LINEAR,)), "rank 4, not 2: set LEMIX_LORA_RANK"),
        (LoraSettings(rank=RANK, alpha=9, targets=(ALL_LINEAR,)), "alpha 12, not 9: set LEMIX_LORA_ALPHA"),
        (LoraSettings(rank=RANK, alpha=ALPHA, targets=("q_proj",)), "not \\['q_proj'\\]"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(
    other: LoraSettings, message: str, model_folder: Folder, tmp_path: Path
) -> None:
    (stage,) = adapted_stages(model_folder("llama"), 1)
    adapter_config(stage, "m").save_pretrained(str(tmp_path))
    different = load_stage(model_folder("llama"), stage.layers)
    add_adapter(different, other)
    with pytest.raises(ConfigurationError, match=message):
        read_adapter(different, tmp_path)


def test_a_folder_without_an_adapter_is_named(model_folder: Folder, tmp_path: Path) -> None:
    (stage,) = adapted_stages(model_folder("llama"), 1)
    with pytest.raises(ConfigurationError, match="has no adapter"):
        read_adapter(stage, tmp_path)
