"""Work on the disk: files and folders that last, and how services await them."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


async def on_disk(work: Callable[[], T]) -> T:
    """Run blocking work in a thread; a cancellation waits until it has come to its end.

    A thread cannot be stopped: without the wait a file could appear after its service has gone.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait([thread])
        raise


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and have the disk hold their names. Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True)
    for folder in missing:
        sync(folder.parent)


def replace_file(path: Path, content: str, *, mode: int = 0o666) -> None:
    """Have `path` hold `content`, all of it or what it held before, and have the disk hold its name.

    `mode` says who may read and write it, less what the process's umask takes away.
    Raises OSError when the disk refuses; only when it refuses the name may the new content be there.
    """
    new = path.with_suffix(".new")
    try:
        new.unlink(missing_ok=True)
        new.touch(mode=mode)
        new.write_text(content, encoding="utf-8")
        sync(new)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
