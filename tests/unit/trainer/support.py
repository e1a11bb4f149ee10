"""What several tests of the trainer share."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.checkpoints import Checkpoint, Manifest

NO_FOLDER = Path("nowhere")


def manifest(version: int, *, node: int = 0, **fields: object) -> Manifest:
    content = {
        "node": node,
        "version": version,
        "num_stages": 2,
        "model": "m",
        "watermark": 0,
        "sequences": (),
        "rejected": (),
        "recent_batch_ids": (),
        "sha256_by_file": {},
        "created_wall_s": 0.0,
    }
    return Manifest.model_validate({**content, **fields})


def checkpoints_of(*versions: int, withheld: tuple[int, ...] = ()) -> list[Checkpoint]:
    """In folders that are not there, named like their versions."""
    return [
        Checkpoint(manifest(version, may_serve=version not in withheld), Path(str(version)))
        for version in versions
    ]


def break_disk_at(patch: pytest.MonkeyPatch, nth: int, error: BaseException) -> list[str]:
    """The nth call that changes the disk raises, a file half written; returns the names of all calls."""
    calls: list[str] = []

    def breaking(owner: object, name: str) -> None:
        plain = getattr(owner, name)

        def broken(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) != nth:
                return plain(*args, **kwargs)
            if name == "write_text":
                path, text = args
                plain(path, text[: len(text) // 2], **kwargs)
            raise error

        patch.setattr(owner, name, broken)

    for name in ("mkdir", "write_text", "rename", "replace"):
        breaking(Path, name)
    breaking(shutil, "copyfile")
    breaking(os, "fsync")
    return calls
