"""Making the runs of a study: all cores, one line of JSON for each finished run, resumed where it stopped."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lemix.studies.grid import Cell, RunCell, Study
from lemix.studies.rows import POLICY, Labels, Metrics
from shared.errors import LemixError

RUN_DEADLINE_S = 900
"""Real time; a run that takes longer has failed."""
FAILURES_SHOWN = 10


class StudyFailedError(LemixError):
    """Some runs of a study failed; the message names them."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The result of one run."""

    cell: Cell
    metrics: Metrics
    wall_s: float


class RunLog:
    """The finished runs of a study: a file with one JSON object a line."""

    def __init__(self, path: Path, commit: str = "") -> None:
        """`commit`: the code that makes the runs to come."""
        self._path = path
        self._commit = commit

    def forget(self, cells: Iterable[Cell]) -> None:
        """Their runs will be made again."""
        keys = {cell.key() for cell in cells}
        self._keep([row for row in self._rows() if _key(row) not in keys])

    def forget_policies(self, policies: Collection[str]) -> None:
        """All runs of theirs will be made again."""
        self._keep([row for row in self._rows() if row["labels"][POLICY] not in policies])

    def finished(self) -> dict[str, Metrics]:
        """The metrics of every run that is there, by its cell's key."""
        return {_key(row): row["metrics"] for row in self._rows()}

    def commits(self, cells: Iterable[Cell]) -> Counter[str]:
        """The code that made the runs of these cells, with their numbers."""
        keys = {cell.key() for cell in cells}
        return Counter(row.get("commit", "") for row in self._rows() if _key(row) in keys)

    def _keep(self, rows: Iterable[dict[str, Any]]) -> None:
        if self._path.exists():
            self._path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _rows(self) -> list[dict[str, Any]]:
        """A line cut off by a kill is taken out."""
        if not self._path.exists():
            return []
        lines = self._path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            self._path.write_text("".join(lines[:-1]))
            lines.pop()
        return [json.loads(line) for line in lines]

    def add(self, ended: Ended) -> None:
        row: dict[str, Any] = {
            "labels": dict(ended.cell.labels),
            "options": ended.cell.options(),
            "metrics": dict(ended.metrics),
            "wall_s": round(ended.wall_s, 3),
            "commit": self._commit,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _key(row: dict[str, Any]) -> str:
    return json.dumps(row["options"], sort_keys=True)


def complete(
    study: Study,
    cells: Sequence[Cell],
    log: RunLog,
    *,
    pool: Executor,
    on_progress: Callable[[int, int], None],
) -> None:
    """Make the runs of `cells` that the log lacks.

    `on_progress` hears how many of how many runs are there. A failed run does not stop the others: they are
    kept for the next time. The pool is shut down. Raises StudyFailedError naming the failed ones; at once
    when a process of the pool has died, for then the others end too.
    """
    there = log.finished()
    wanted = {cell.key(): cell for cell in cells}
    missing = [cell for key, cell in wanted.items() if key not in there]
    num_there = len(wanted) - len(missing)
    failures: list[str] = []
    number = num_there
    on_progress(number, len(wanted))
    try:
        for number, outcome in enumerate(_run_all(study, missing, pool), num_there + 1):
            if isinstance(outcome, Ended):
                log.add(outcome)
            else:
                failures.append(outcome)
            on_progress(number, len(wanted))
    except BrokenExecutor as error:
        raise StudyFailedError(
            f"a process that made runs of {study.name} was killed, perhaps for want of memory;"
            f" {number - len(failures)} of {len(wanted)} runs are kept: start it again to make the others"
        ) from error
    if failures:
        some = "".join(f"\n  {failure}" for failure in failures[:FAILURES_SHOWN])
        raise StudyFailedError(f"{len(failures)} of {len(missing)} runs of {study.name} failed:{some}")


def finished_runs(study: Study, log: RunLog) -> list[tuple[Labels, Metrics]]:
    """All runs of the study that are there, in the order of its cells."""
    there = log.finished()
    return [(cell.labels, there[key]) for cell in study.cells if (key := cell.key()) in there]


def process_pool(study: Study, workers: int | None) -> ProcessPoolExecutor:
    """For the runs of a study; `workers` None: as many as there are cores."""
    num_workers = min(filter(None, (workers or os.cpu_count(), study.max_workers)), default=1)
    return ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("forkserver"))


def _run_all(study: Study, cells: Iterable[Cell], pool: Executor) -> Iterator[Ended | str]:
    """Yield the result of each run, as they end; a failure is told in words."""
    submitted = {pool.submit(run_within, study.run, cell): cell for cell in cells}
    try:
        # Each run ends by itself within RUN_DEADLINE_S.
        for future in as_completed(submitted, timeout=RUN_DEADLINE_S * (len(submitted) + 1)):
            yield _outcome(submitted[future], future)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _outcome(cell: Cell, future: "Future[tuple[Metrics, float]]") -> Ended | str:
    """The result of a run. Raises BrokenExecutor when the pool can no longer be used."""
    error = future.exception()
    if isinstance(error, BrokenExecutor):
        raise error
    if error is not None:
        return f"{dict(cell.labels)}, seed {cell.cluster.seed}: {type(error).__name__}: {error}"
    return Ended(cell, *future.result())


class _TooLong(SystemExit):
    """The one kind of error, with KeyboardInterrupt, that event loops and services let through."""


def run_within(run: RunCell, cell: Cell) -> tuple[Metrics, float]:
    """The run's metrics and how long it took, in real seconds. Raises StudyFailedError after
    RUN_DEADLINE_S.
    """
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(RUN_DEADLINE_S)
    began_s = time.monotonic()
    try:
        return run(cell), time.monotonic() - began_s
    except _TooLong:
        raise StudyFailedError(f"not over after {RUN_DEADLINE_S} s") from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise _TooLong
