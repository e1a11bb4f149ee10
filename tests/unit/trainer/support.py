"""What several tests of the trainer share."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

NO_FOLDER = Path("nowhere")


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
