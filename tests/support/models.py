"""Tiny random models of the proven families, saved as their publishers would."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from shared.model_files import read_card
from shared.settings import EMBEDDED_MODEL

VOCAB_SIZE = 96
NUM_LAYERS = 5  # does not divide by 2, 3 or 4

_LLAMA_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
_GPT2_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": NUM_LAYERS,
    "n_head": 4,
    "n_positions": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**_LLAMA_SHAPE)),
    "llama_tied": (LlamaForCausalLM, LlamaConfig(**_LLAMA_SHAPE, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**_LLAMA_SHAPE, tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**_LLAMA_SHAPE, sliding_window=8)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**_GPT2_SHAPE)),
    "gpt_neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(**{key: value for key, value in _LLAMA_SHAPE.items() if key != "num_key_value_heads"}),
    ),
}


def save_tiny_text_model(folder: Path) -> None:
    """A random Llama that has the embedded model's tokenizer, and so can write text."""
    card = read_card(Path(EMBEDDED_MODEL), "embedded")
    shape = {**_LLAMA_SHAPE, "num_hidden_layers": 2, "eos_token_id": list(card.eos_token_ids)}
    torch.manual_seed(7)
    LlamaForCausalLM(LlamaConfig(**shape | {"vocab_size": card.vocab_size})).save_pretrained(folder)
    shutil.copy(Path(EMBEDDED_MODEL) / "tokenizer.json", folder)


def save_tiny_model(family: str, folder: Path) -> Any:
    """A seeded random model in float32, saved in `folder`; returns it in evaluation mode."""
    model_class, config = FAMILIES[family]
    torch.manual_seed(7)
    model = model_class(config).eval()
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    return model
