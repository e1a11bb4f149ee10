"""One file of the adapter that all stages saved a part of: `peft` reads no index and no shards.

A safetensors file is 8 bytes (the length of the header, little-endian), the header in JSON, and the data;
the header has each tensor's place within the data (https://github.com/huggingface/safetensors). The trainer
needs no more of it than this, and does without torch.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared import checkpoints
from shared.disk import sync

_LENGTH_BYTES = 8
_METADATA = "__metadata__"


def join_adapter(folder: Path, shard_names: Iterable[str]) -> str:
    """Put the shards' tensors into the adapter's file and remove the shards; returns the file's SHA-256.

    Raises OSError when the disk refuses.
    """
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    data = b""
    paths = [folder / name for name in shard_names]
    for path in paths:
        places, part = _read(path)
        for name, place in places.items():
            start, end = place["data_offsets"]
            header[name] = {**place, "data_offsets": [start + len(data), end + len(data)]}
        data += part
    content = _bytes(header) + data
    (folder / checkpoints.ADAPTER_NAME).write_bytes(content)
    sync(folder / checkpoints.ADAPTER_NAME)
    for path in paths:
        path.unlink()
    return hashlib.sha256(content).hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    places = json.loads(content[_LENGTH_BYTES:start])
    places.pop(_METADATA, None)
    return places, content[start:]


def _bytes(header: dict[str, Any]) -> bytes:
    """With spaces up to a multiple of 8, so that the data is aligned."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
