import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTJConfig,
    MambaConfig,
    OPTConfig,
    T5Config,
)

from shared.errors import ConfigurationError, UnsupportedModelError
from shared.model.attention import PackedSegments
from shared.model.index import write_index
from shared.model.loader import in_published_names, load_stage, model_partition, read_config
from shared.model.partition import partition

EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
ROUND_TRIP = ["llama", "llama-tied", "qwen2", "qwen3", "gpt2", "gpt-neox", "mixtral"]


def save_shards(folder: Path, num_stages: int, into: Path) -> None:
    """Write one shard a stage and the index, as a checkpoint does."""
    shards, size_bytes = {}, 0
    for layers in partition(5, num_stages):
        stage = load_stage(folder, layers)
        tensors = in_published_names(stage, stage.named_tensors())
        name = f"stage-{layers.stage}.safetensors"
        save_file(tensors, into / name, metadata={"format": "pt"})
        shards.update(dict.fromkeys(tensors, name))
        size_bytes += sum(tensor.nbytes for tensor in tensors.values())
    write_index(into, shards, size_bytes)
    shutil.copy(folder / "config.json", into)


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("family", ROUND_TRIP)
def test_shards_of_all_stages_are_the_whole_model(
    family: str,
    num_stages: int,
    tmp_path: Path,
    model_folder: Callable[[str], Path],
    whole_model: Callable[..., Any],
) -> None:
    save_shards(model_folder(family), num_stages, tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    read_back, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = whole_model(family).state_dict()
    assert read_back.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read_back.state_dict().items())
    written = {name for path in tmp_path.glob("*.safetensors") for name in load_file(path)}
    assert written == set(load_file(model_folder(family) / "model.safetensors"))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_a_stage_loads_without_the_shards_of_others(
    family: str, tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    save_shards(model_folder(family), 3, tmp_path)
    for layers in partition(5, 3):
        alone = tmp_path / f"alone-{layers.stage}"
        alone.mkdir()
        needed = {layers.stage} | ({0} if layers.is_last else set())  # the tied head is in the first shard
        for name in [
            "config.json",
            "model.safetensors.index.json",
            *(f"stage-{n}.safetensors" for n in needed),
        ]:
            shutil.copy(tmp_path / name, alone)
        expected = load_stage(model_folder(family), layers).named_tensors()
        found = load_stage(alone, layers).named_tensors()
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_missing_tensor_is_named(tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    save_shards(model_folder("llama"), 3, tmp_path)
    (tmp_path / "stage-1.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"stage 1 has missing_keys: model\.layers\.2"):
        load_stage(tmp_path, partition(5, 3)[1])


def test_a_folder_without_weights_is_refused(tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    shutil.copy(model_folder("llama") / "config.json", tmp_path)
    with pytest.raises(ConfigurationError, match=r"neither .* nor model.safetensors"):
        load_stage(tmp_path, partition(5, 1)[0])


def test_layers_beyond_the_model_are_refused(model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigurationError, match="5 layers"):
        load_stage(model_folder("llama"), partition(6, 1)[0])


def test_weights_come_in_the_dtype_asked(tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    source = model_folder("llama-tied")
    halves = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(halves, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stage = load_stage(tmp_path, partition(5, 2)[1])
    assert {tensor.dtype for tensor in stage.parameters()} == {torch.float32}
    name = "model.layers.4.mlp.up_proj.weight"
    assert torch.equal(stage.parameter(name), halves[name].float())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(vocab_size=97, d_model=32, num_layers=2), "not a decoder-only"),
        (MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2), "attention is not behind"),
        (GPTJConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, rotary_dim=4), "attention is not behind"),
        (
            OPTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
            "no list of layers",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_models_that_cannot_be_split_are_refused(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^{config.model_type}: .*{reason}"):
        model_partition(config, 2)


def test_attention_that_is_not_plain_is_refused_when_loading(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="gemma2: attention with softcap"):
        load_stage(tmp_path, partition(2, 2)[0])


def test_unknown_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(UnsupportedModelError, match="no such model type"):
        read_config(tmp_path)


def test_the_head_counts_when_cutting(model_folder: Callable[[str], Path]) -> None:
    config = read_config(model_folder("llama-tied"))
    config.vocab_size = 1000
    assert [layers.num_layers for layers in model_partition(config, 2)] == [4, 1]


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_the_tied_embedding_goes_by_one_name(family: str, model_folder: Callable[[str], Path]) -> None:
    stages = [load_stage(model_folder(family), layers) for layers in partition(5, 3)]
    name = stages[0].tied_embedding_name
    assert name is not None and name in stages[0].named_tensors()
    assert stages[1].tied_embedding_name is None and name not in stages[1].named_tensors()
    assert stages[2].tied_embedding_name == name
    assert torch.equal(stages[2].parameter(name), stages[0].parameter(name))
    assert "lm_head.weight" not in stages[2].named_tensors()


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_parameters_are_swapped_in_place(family: str, model_folder: Callable[[str], Path]) -> None:
    stage = load_stage(model_folder(family), partition(5, 1)[0])
    tokens = torch.arange(4)

    def logits() -> torch.Tensor:
        return stage.forward(tokens, tokens, PackedSegments((4,)))

    first, before = dict(stage.named_tensors()), logits()
    for name, parameter in first.items():
        stage.set_parameter(name, torch.nn.Parameter(parameter.detach() * 1.5))
    assert not torch.allclose(logits(), before)
    assert stage.parameter("model.embed_tokens.weight") is not first["model.embed_tokens.weight"]
    for name, parameter in first.items():
        stage.set_parameter(name, parameter)
    assert torch.equal(logits(), before)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("is_same", [True, False])
def test_a_head_of_its_own_counts_on_all_stages_whatever_the_config_says(
    family: str, is_same: bool, tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder(family), folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = next(tensor for name, tensor in tensors.items() if name.endswith(EMBEDDINGS))
    tensors["lm_head.weight"] = embedding.clone() if is_same else embedding.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_config(folder)
    stages = [load_stage(folder, layers) for layers in model_partition(config, 2)]
    assert [stage.tied_embedding_name is not None for stage in stages] == [is_same, is_same]
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(stages[-1].model.get_output_embeddings().weight, whole.lm_head.weight)


def test_a_stage_that_cannot_see_whether_the_head_is_tied_says_so(
    tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama-tied"), folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
    write_index(folder, names | {"lm_head.weight": "b.safetensors"}, 1)
    first, _ = model_partition(read_config(folder), 2)
    with pytest.raises(ConfigurationError, match=r"need b\.safetensors"):
        load_stage(folder, first)
