"""The folder of one run: logs, the description of the running cluster, and who holds it."""

import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from lemix.folder_lock import FolderLock
from shared.errors import ConfigurationError

CLUSTER_FILE = "cluster.json"
NATS_PORT_FILE = "nats_port"
NATS_USERS = "nats_users"
OWN_ENTRIES = (
    "logs",
    "nats",
    NATS_PORT_FILE,
    NATS_USERS,
    "checkpoints",
    "files",
    "fine_tuning",
    "spans.jsonl",
    "summary.json",
    "demo.png",
    CLUSTER_FILE,
)
"""The entries that a run writes into its folder."""
MAX_NAME_BYTES = 255
"""The longest name of a folder, on most file systems."""


def check_run_name(name: str) -> None:
    """Raises ConfigurationError when no run can have this name: its folder lies in the folder of runs."""
    is_plain = Path(name).name == name and name not in ("", "..") and name.isprintable()
    if not is_plain or len(name.encode()) > MAX_NAME_BYTES:
        raise ConfigurationError(f"{name!r} is no name of a run: it must be one plain folder name")


class ClusterFile(BaseModel):
    """The facts that other commands need about a running cluster."""

    model_config = ConfigDict(frozen=True)

    nats_url: str
    nats_users: Path | None = None
    """The folder of its server's users; None: the server lets everybody in."""
    api_url: str
    launcher_pid: int
    pids: dict[str, int]
    """Process id of each service, by its name."""


class RunFolder:
    """The files of one run; at most one launcher holds a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FolderLock | None = None

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def nats_store(self) -> Path:
        return self.path / "nats"

    @property
    def nats_users(self) -> Path:
        return self.path / NATS_USERS

    @property
    def nats_port(self) -> int | None:
        """Where the run's own NATS server listened before; None before the first time.

        Raises ConfigurationError when the file does not say it.
        """
        file = self.path / NATS_PORT_FILE
        try:
            return int(file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"cannot read a port from {file}: {error}; remove it") from error

    def keep_nats_port(self, port: int) -> None:
        """Whoever publishes to this run finds its server there again after a restart."""
        (self.path / NATS_PORT_FILE).write_text(f"{port}\n")

    def claim(self) -> None:
        """Make the folder and hold it. Raises ConfigurationError when another launcher does."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock.acquire(self.path)
        if self._lock is None:
            raise ConfigurationError(
                f"run {self.path.name!r} is already running; give this one another --name"
            )

    def write_cluster(self, cluster: ClusterFile) -> None:
        temporary = self.path / f".{CLUSTER_FILE}"
        temporary.write_text(cluster.model_dump_json(indent=2) + "\n")
        temporary.replace(self.path / CLUSTER_FILE)

    def release(self) -> None:
        """Let the folder go; does nothing when it was never claimed."""
        if self._lock is not None:
            (self.path / CLUSTER_FILE).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None


def clear(path: Path) -> None:
    """Remove what an earlier run wrote into its folder, and nothing else.

    Raises ConfigurationError when that run is still running.
    """
    if not path.exists():
        return
    lock = FolderLock.acquire(path)
    if lock is None:
        raise ConfigurationError(f"run {path.name!r} is still running; stop it first")
    for name in OWN_ENTRIES:
        entry = path / name
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    lock.release()


def running_clusters(runs_dir: Path) -> dict[str, ClusterFile]:
    """Every cluster that is running now, by the name of its run."""
    files = sorted(runs_dir.glob(f"*/{CLUSTER_FILE}"))
    return {file.parent.name: found for file in files if (found := _read_if_running(file)) is not None}


def _read_if_running(file: Path) -> ClusterFile | None:
    lock = FolderLock.acquire(file.parent)
    if lock is not None:
        lock.release()
        return None
    try:
        return ClusterFile.model_validate_json(file.read_text())
    except (OSError, ValidationError):
        return None
