"""The index file which makes the stages' safetensors shards one checkpoint. Needs no torch."""

import json
from collections.abc import Mapping
from pathlib import Path

INDEX_NAME = "model.safetensors.index.json"


def write_index(folder: Path, shard_names_by_tensor: Mapping[str, str], total_size_bytes: int) -> Path:
    """Write the index which `from_pretrained` reads, and return its path.

    `shard_names_by_tensor` maps each tensor's name to the name of the file in `folder` that holds it;
    `total_size_bytes` is the size of all tensors together. The file appears whole or not at all.
    """
    content = {
        "metadata": {"total_size": total_size_bytes},
        "weight_map": dict(sorted(shard_names_by_tensor.items())),
    }
    path = folder / INDEX_NAME
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return unfinished.replace(path)
