"""Tiny random models of each family, saved as a person would have them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 97
PLAIN: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
GROUPED: dict[str, Any] = {**PLAIN, "num_key_value_heads": 2, "intermediate_size": 48}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "llama-tied": lambda: LlamaConfig(tie_word_embeddings=True, **GROUPED),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen2-window": lambda: Qwen2Config(
        use_sliding_window=True, sliding_window=4, max_window_layers=2, **GROUPED
    ),
    "qwen3": lambda: Qwen3Config(head_dim=16, **GROUPED),
    "mistral-window": lambda: MistralConfig(sliding_window=4, **GROUPED),
    "gpt2": lambda: GPT2Config(**PLAIN),
    "gpt-neox": lambda: GPTNeoXConfig(intermediate_size=48, **PLAIN),
    "mixtral": lambda: MixtralConfig(num_local_experts=4, **GROUPED),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model, made when first asked for; tests must not change it."""
    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            torch.manual_seed(0)
            folders[family] = tmp_path_factory.mktemp(family)
            model = AutoModelForCausalLM.from_config(FAMILIES[family]())
            randomise_vectors(model)
            model.save_pretrained(folders[family])
        return folders[family]

    return folder_of


def randomise_vectors(model: torch.nn.Module) -> None:
    """Biases start at 0 and norms at 1, which would hide a mistake in either."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture(scope="session")
def whole_model(model_folder: Callable[[str], Path]) -> Callable[..., Any]:
    """The family's model as transformers loads it."""

    def load(family: str, dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=dtype)

    return load
