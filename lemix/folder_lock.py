"""A folder that belongs to one living process: the kernel lets go of the lock when the process dies."""

import fcntl
import os
from pathlib import Path


class FolderLock:
    """An exclusive lock on a folder; not inherited by child processes."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    @classmethod
    def acquire(cls, folder: Path) -> "FolderLock | None":
        """The lock, or None when another process (or an earlier lock of this one) holds it."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return cls(handle)

    def release(self) -> None:
        os.close(self._handle)
