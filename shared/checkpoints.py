"""Where durable checkpoints lie and what they contain. Needs no torch.

    <root>/node-0/step-00000016/model-00001-of-00002.safetensors   each stage's weights
                                model.safetensors.index.json       makes them one model
                                optimizer-00001-of-00002.safetensors
                                config.json, tokenizer.json, ...   so that `from_pretrained` reads the folder
                                lemix.json                         the manifest, written last

A folder without a readable manifest is no checkpoint: its writer died before it was whole.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from shared.messages.base import Message

MANIFEST_NAME = "lemix.json"

_NODE = re.compile(r"node-(\d+)")
_STEP = re.compile(r"step-\d{8,}")

log = logging.getLogger(__name__)


class Manifest(Message):
    """What a checkpoint is, and which training batches its weights contain."""

    node: int
    version: int
    """Optimizer steps that the weights contain."""
    num_stages: int
    model: str
    watermark: int
    """Stream sequences up to this one are done: in a durable checkpoint of some node, or refused."""
    sequences: tuple[int, ...]
    """Sequences above the watermark whose batches these weights contain."""
    rejected: tuple[int, ...]
    """Sequences above the watermark that no weights will contain: bad batches and duplicates."""
    recent_batch_ids: tuple[str, ...]
    """Ids of the newest batches that these weights contain, oldest first."""
    sha256_by_file: dict[str, str]
    created_wall_s: float
    """Unix time."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A durable checkpoint."""

    manifest: Manifest
    folder: Path


def node_folder(root: Path, node: int) -> Path:
    """The folder that holds all checkpoints of `node`."""
    return root / f"node-{node}"


def checkpoint_name(version: int) -> str:
    """The name of a checkpoint's folder: sorts by version."""
    return f"step-{version:08}"


def nodes(root: Path) -> list[int]:
    """Nodes that have a checkpoint folder under `root`."""
    names = (_NODE.fullmatch(path.name) for path in root.glob("node-*"))
    return sorted(int(name[1]) for name in names if name)


def checkpoints(root: Path, node: int) -> list[Checkpoint]:
    """All whole checkpoints of `node`, newest first."""
    folders = (path for path in node_folder(root, node).glob("step-*") if _STEP.fullmatch(path.name))
    found = [Checkpoint(manifest, folder) for folder in folders if (manifest := read(folder))]
    return sorted(found, key=lambda checkpoint: checkpoint.manifest.version, reverse=True)


def latest(root: Path, node: int) -> Checkpoint | None:
    """The newest whole checkpoint of `node`."""
    return next(iter(checkpoints(root, node)), None)


def read(folder: Path) -> Manifest | None:
    """The manifest of the checkpoint in `folder`; None when the folder is no whole checkpoint."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        log.warning("%s is not used: %s", folder, error)
        return None
    missing = [name for name in manifest.sha256_by_file if not (folder / name).exists()]
    if missing:
        log.warning("%s is not used: %s are missing", folder, ", ".join(missing))
        return None
    return manifest


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and sync it with the names in `folder`: what follows may count on them.

    Raises OSError when the disk refuses.
    """
    path = folder / MANIFEST_NAME
    path.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
