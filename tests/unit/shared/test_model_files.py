"""Where a model's files lie, and what its config says."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from shared.errors import ConfigurationError, UnsupportedModelError
from shared.model_files import CONFIG_FILES, approximate_num_weights, name_of, read_card, resolve


def write_config(folder: Path, **config: object) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def test_existing_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path), CONFIG_FILES) == tmp_path
    assert name_of(str(tmp_path)) == tmp_path.name


@pytest.mark.parametrize("model", ["/no/such/folder", "not a name!", "nobody/nothing"])
def test_what_is_nowhere_is_named(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigurationError, match=model):
        resolve(model, CONFIG_FILES)


def test_hub_name_is_the_name() -> None:
    assert name_of("someone/some-model") == "someone/some-model"


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "n_ctx"])
def test_context_length_has_several_names(key: str, tmp_path: Path) -> None:
    write_config(tmp_path, model_type="any", vocab_size=10, **{key: 64})
    card = read_card(tmp_path, "m")
    assert (card.name, card.model_type, card.vocab_size, card.context_length) == ("m", "any", 10, 64)
    assert (card.bos_token_id, card.eos_token_ids) == (None, ())


def test_generation_config_says_what_ends_a_text(tmp_path: Path) -> None:
    write_config(tmp_path, vocab_size=10, n_ctx=8, eos_token_id=1, bos_token_id=2)
    assert read_card(tmp_path, "m").eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    card = read_card(tmp_path, "m")
    assert (card.bos_token_id, card.eos_token_ids) == (2, (3, 4))


def test_config_without_sizes_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, vocab_size=10)
    with pytest.raises(UnsupportedModelError, match="n_positions"):
        read_card(tmp_path, "m")


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_unreadable_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        read_card(tmp_path, "m")


@pytest.mark.parametrize("config", [GPT2Config(), LlamaConfig(), Qwen3Config(), Gemma2Config()])
def test_the_number_of_weights_is_known_within_a_factor_of_two(
    config: PretrainedConfig, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    told = approximate_num_weights(tmp_path)
    assert told is not None
    assert 1 / 2 < told / sum(weight.numel() for weight in model.parameters()) < 2


def test_a_config_without_sizes_tells_no_number_of_weights(tmp_path: Path) -> None:
    write_config(tmp_path, hidden_size=64, vocab_size=100)
    assert approximate_num_weights(tmp_path) is None


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": None}, (2, 5)),
        ({"eos_token_id": 2}, None, (2, 5)),
        ({"eos_token_id": 2}, {"eos_token_id": [3, 5]}, (3, 5)),
        ({"eos_token_id": [2, None, -1]}, None, (2, 5)),
        ({"eos_token_id": 2}, {"eos_token_id": 99}, (2, 5)),
        ({}, None, (5,)),
    ],
)
def test_texts_end_where_the_configs_or_the_tokenizer_say(
    config: dict[str, object],
    generation: dict[str, object] | None,
    expected: tuple[int, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_config(tmp_path, vocab_size=10, n_ctx=8, **config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 5, "content": "</s>"}]}')
    assert read_card(tmp_path, "m").eos_token_ids == expected
    assert bool(caplog.messages) == (expected == (2, 5))


def test_an_end_token_that_the_model_has_no_words_for_ends_nothing(tmp_path: Path) -> None:
    write_config(tmp_path, vocab_size=5, n_ctx=8, eos_token_id=2)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 5, "content": "</s>"}]}')
    assert read_card(tmp_path, "m").eos_token_ids == (2,)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "a_new_one"])
def test_quantised_weights_are_refused_by_name(method: str, tmp_path: Path) -> None:
    write_config(tmp_path, vocab_size=5, n_ctx=8, quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedModelError, match=rf"quantised weights \({method}\)"):
        read_card(tmp_path, "m")


@pytest.mark.parametrize(
    ("name", "advice"), [("adapter_config.json", "merge them with peft"), ("m.gguf", "gguf_file=")]
)
def test_what_is_no_whole_model_is_named_with_a_way_out(name: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigurationError, match=advice):
        read_card(tmp_path, "m")


@pytest.mark.parametrize(("name", "advice"), [("m.gguf", "gguf_file="), ("m.safetensors", "name the folder")])
def test_a_file_is_no_model(name: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(ConfigurationError, match=advice):
        resolve(str(tmp_path / name), CONFIG_FILES)


def test_a_model_of_several_is_refused_with_the_reason(tmp_path: Path) -> None:
    write_config(tmp_path, text_config={"vocab_size": 5})
    with pytest.raises(UnsupportedModelError, match="under text_config"):
        read_card(tmp_path, "m")
