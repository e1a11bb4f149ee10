"""Files that outlive the gateway: records that are replaced as a whole, and lists that grow. All block."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from services.gateway.jobs.job import Job
from shared.disk import replace_file
from shared.errors import ConfigurationError

EVENTS = "events"
CHECKPOINTS = "checkpoints"
VERDICTS = "verdicts"
LISTS = (EVENTS, CHECKPOINTS, VERDICTS)


class _Saved(NamedTuple):
    num_lines: int
    num_bytes: int


class JobStore:
    """Jobs below `root`: `<id>.json` is the job; `<id>.events.jsonl`, `<id>.checkpoints.jsonl` and
    `<id>.verdicts.jsonl` are its lists, of which as many lines count as the job says.

    Ids are the gateway's own: no name from outside becomes a path.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._saved: dict[Path, _Saved] = {}
        """The valid part of each list; lines behind it were written by a save that failed."""

    def load(self) -> list[Job]:
        """All jobs, oldest first. Raises ConfigurationError when one cannot be read."""
        self._root.mkdir(parents=True, exist_ok=True)
        jobs = sorted(map(_read, self._root.glob("ftjob-*.json")), key=lambda job: job.number)
        for job in jobs:
            for name, count in _counts(job).items():
                path = self._list(job.id, name)
                self._saved[path] = _Saved(count, sum(len(line) for line in _lines(path)[:count]))
        return jobs

    def write(self, job: Job, lines_by_list: Mapping[str, Sequence[bytes]]) -> None:
        """Save a job with the newest lines of its lists; those among them that are saved already are left.

        Raises OSError; then the job is as it was before.
        """
        saved = {}
        for name, total in _counts(job).items():
            path = self._list(job.id, name)
            saved[path] = self._append(path, lines_by_list.get(name, ()), total)
        replace_file(self._root / f"{job.id}.json", job.model_dump_json(indent=1) + "\n")
        self._saved.update(saved)

    def lines(self, job_id: str, name: str, numbers: range) -> list[bytes]:
        """These lines, from 0, of one of the job's lists."""
        lines = _lines(self._list(job_id, name))
        return [lines[number] for number in numbers]

    def remove(self, job_id: str) -> None:
        """Forget a job. Raises OSError."""
        (self._root / f"{job_id}.json").unlink(missing_ok=True)
        for name in LISTS:
            path = self._list(job_id, name)
            path.unlink(missing_ok=True)
            self._saved.pop(path, None)

    def _append(self, path: Path, lines: Sequence[bytes], total: int) -> _Saved:
        """Bring a list to `total` lines, the last of which `lines` are."""
        saved = self._saved.get(path, _Saved(0, 0))
        if saved.num_lines == total:
            return saved
        with path.open("ab") as file:
            file.truncate(saved.num_bytes)
            file.write(b"".join(line + b"\n" for line in lines[saved.num_lines - total :]))
            file.flush()
            os.fsync(file.fileno())
            return _Saved(total, file.tell())

    def _list(self, job_id: str, name: str) -> Path:
        return self._root / f"{job_id}.{name}.jsonl"


def _counts(job: Job) -> dict[str, int]:
    """The lines of each list that count."""
    return {EVENTS: job.num_events, CHECKPOINTS: job.num_checkpoints, VERDICTS: job.num_verdicts}


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _read(path: Path) -> Job:
    try:
        return Job.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigurationError(f"{path} is no fine-tuning job that can be read: {error}") from error
