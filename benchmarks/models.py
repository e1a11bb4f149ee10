"""The random-weight models of the benchmarks; sizes as in the measurements that the targets rest on."""

import json
import random
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from shared.settings import EMBEDDED_MODEL

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "num_hidden_layers": 8, "vocab_size": 8192, "num_attention_heads": 4},
    "big": {"hidden_size": 1024, "num_hidden_layers": 12, "vocab_size": 32000, "num_attention_heads": 16},
    "huge": {"hidden_size": 2048, "num_hidden_layers": 20, "vocab_size": 32000, "num_attention_heads": 16},
    "large": {"hidden_size": 2560, "num_hidden_layers": 24, "vocab_size": 32000, "num_attention_heads": 20},
}
INTERMEDIATE = {"small": 688, "big": 2752, "huge": 5504, "large": 6912}
DTYPES = {"small": "float32", "big": "float32", "huge": "bfloat16", "large": "bfloat16"}
"""The dtypes in which both sides compute."""


def models_for(device: str) -> tuple[str, ...]:
    """Those that say something about it."""
    return ("small", "big") if device == "cpu" else ("big", "huge")


def endless_folder(folder: Path, base: Path) -> Path:
    """That model, but for its end token: greedy answers of a real model would end before they are timed."""
    endless = base / f"{folder.name}-endless"
    if not (endless / "config.json").exists():
        endless.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("*"):
            if file.name not in ("config.json", "generation_config.json"):
                (endless / file.name).symlink_to(file.absolute())
        config = json.loads((folder / "config.json").read_text())
        (endless / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    return endless


def vocab_size(folder: Path) -> int:
    """Tokens of a saved model."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def model_folder(name: str, base: Path, device: str = "cpu") -> Path:
    """The saved model, made at first use: seeded, never ending a completion by itself.

    Weights are drawn on `device`. They are saved in float32, those of `large` (4 GB) in its own dtype.
    """
    folder = base / name
    if not (folder / "model.safetensors").exists():
        config = LlamaConfig(
            **SHAPES[name],
            intermediate_size=INTERMEDIATE[name],
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        saved_in = DTYPES[name] if name == "large" else "float32"
        with torch.device(device):
            weights = LlamaForCausalLM._from_config(config, dtype=getattr(torch, saved_in))
        weights.save_pretrained(folder, max_shard_size="8GB")
        # Every token has a text, so that a stream shows each one as it comes.
        words = {f"w{number}": number for number in range(SHAPES[name]["vocab_size"])}
        Tokenizer(WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


def num_weights(folder: Path) -> int:
    """Weights of a saved model."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping


def text_model_folder(name: str, base: Path) -> Path:
    """The same weights with a tokenizer of that size, which can spell any text, and an end token."""
    weights, folder = model_folder(name, base), base / f"{name}-text"
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").symlink_to((weights / "model.safetensors").absolute())
        config = json.loads((weights / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
        write_tokenizer(folder / "tokenizer.json", SHAPES[name]["vocab_size"])
    return folder


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """The embedded tokenizer, filled up with random pairs of its tokens (token 0 is the end)."""
    tokenizer = json.loads((Path(EMBEDDED_MODEL) / "tokenizer.json").read_text())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    chance, own = random.Random(0), list(vocab)[1:]
    while len(vocab) < vocab_size:
        pair = chance.choices(own, k=2)
        if vocab.setdefault("".join(pair), len(vocab)) == len(vocab) - 1:
            merges.append(pair)
    path.write_text(json.dumps(tokenizer))
