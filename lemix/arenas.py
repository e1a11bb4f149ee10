"""The private folder in which the stages of one run keep the shared memory for their tensors."""

import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from lemix.folder_lock import FolderLock

PREFIX = "lemix-"
SHARED_MEMORY = Path("/dev/shm")


def default_base() -> Path:
    """Shared memory where the system has it, else its folder for temporary files."""
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


class ArenaFolder:
    """A fresh folder `lemix-<launcher's pid>-<random>`, held by a lock until it is removed."""

    def __init__(self, path: Path, lock: FolderLock) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, base: Path) -> "ArenaFolder":
        """Make the folder, readable by this user only."""
        path = base / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        path.mkdir(mode=0o700)
        lock = FolderLock.acquire(path)
        assert lock is not None, f"{path} is fresh, and yet locked"
        return cls(path, lock)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()


def remove_abandoned(base: Path) -> list[Path]:
    """Remove the folders of launchers that were killed; returns those removed.

    A folder goes only when its launcher is dead and nobody holds its lock: the pid alone may have
    been given to another process, or belong to another container.
    """
    return [path for path in sorted(base.glob(f"{PREFIX}*-*")) if _launcher_is_dead(path) and _remove(path)]


def _launcher_is_dead(path: Path) -> bool:
    pid = path.name.removeprefix(PREFIX).partition("-")[0]
    return pid.isdecimal() and not _is_running(int(pid))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> bool:
    with suppress(PermissionError, FileNotFoundError, NotADirectoryError):
        lock = FolderLock.acquire(path)
        if lock is not None:
            ArenaFolder(path, lock).remove()
            return True
    return False
