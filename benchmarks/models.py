"""The two random-weight models of the benchmarks; sizes as in the measurements that the targets rest on."""

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shared.model_files import TOKENIZER_FILES
from shared.settings import EMBEDDED_MODEL

SHAPES = {
    "small": {"hidden_size": 256, "num_hidden_layers": 8, "vocab_size": 8192, "num_attention_heads": 4},
    "big": {"hidden_size": 1024, "num_hidden_layers": 12, "vocab_size": 32000, "num_attention_heads": 16},
}
INTERMEDIATE = {"small": 688, "big": 2752}


def model_folder(name: str, base: Path) -> Path:
    """The saved model, made at first use: float32, seeded, never ending a completion by itself."""
    folder = base / name
    if not (folder / "model.safetensors").exists():
        config = LlamaConfig(
            **SHAPES[name],
            intermediate_size=INTERMEDIATE[name],
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="8GB")
        for file in TOKENIZER_FILES:
            shutil.copy(Path(EMBEDDED_MODEL) / file, folder)
    return folder
