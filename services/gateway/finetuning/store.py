"""What must outlive the gateway: records that are replaced as a whole, and lists that grow. All block."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from services.gateway.finetuning.jobs import Job
from shared.checkpoints import sync
from shared.errors import ConfigurationError

EVENTS = "events"
CHECKPOINTS = "checkpoints"


def replace_file(path: Path, content: bytes) -> None:
    """Have `path` hold `content`: all of it, or as before, whatever happens meanwhile. Raises OSError."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    sync(new)
    sync(new.replace(path).parent)


class JobStore:
    """Jobs below `root`: `<id>.json` is the job; `<id>.events.jsonl` and `<id>.checkpoints.jsonl` are its
    lists, of which as many lines count as the job says.

    Ids are the gateway's own: no name from outside becomes a path.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._sizes: defaultdict[Path, int] = defaultdict(int)
        """Bytes of each list that count; what stands behind them was written by a save that failed."""

    def load(self) -> list[Job]:
        """All jobs, oldest first. Raises ConfigurationError when one cannot be read."""
        self._root.mkdir(parents=True, exist_ok=True)
        jobs = sorted(map(_read, self._root.glob("ftjob-*.json")), key=lambda job: job.number)
        for job in jobs:
            for name, count in ((EVENTS, job.num_events), (CHECKPOINTS, job.num_checkpoints)):
                path = self._list(job.id, name)
                self._sizes[path] = sum(len(line) for line in _lines(path)[:count])
        return jobs

    def write(self, job: Job, lines_by_list: Mapping[str, Sequence[bytes]]) -> None:
        """Save a job with the new lines of its lists. Raises OSError; then the job is as it was before."""
        sizes = {
            path: self._append(path, lines)
            for name, lines in lines_by_list.items()
            if lines and (path := self._list(job.id, name))
        }
        replace_file(self._root / f"{job.id}.json", job.model_dump_json(indent=1).encode() + b"\n")
        self._sizes.update(sizes)

    def lines(self, job_id: str, name: str, numbers: range) -> list[bytes]:
        """These lines, from 0, of one of the job's lists."""
        lines = _lines(self._list(job_id, name))
        return [lines[number] for number in numbers]

    def remove(self, job_id: str) -> None:
        """Forget a job. Raises OSError."""
        (self._root / f"{job_id}.json").unlink(missing_ok=True)
        for name in (EVENTS, CHECKPOINTS):
            path = self._list(job_id, name)
            path.unlink(missing_ok=True)
            self._sizes.pop(path, None)

    def _append(self, path: Path, lines: Sequence[bytes]) -> int:
        with path.open("ab") as file:
            file.truncate(self._sizes[path])
            file.write(b"".join(line + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def _list(self, job_id: str, name: str) -> Path:
        return self._root / f"{job_id}.{name}.jsonl"


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _read(path: Path) -> Job:
    try:
        return Job.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigurationError(f"{path} is no fine-tuning job that can be read: {error}") from error
