"""Jobs on disk: all of what was saved, or all of what was saved before."""

import os
from pathlib import Path
from typing import Any

import pytest

from services.gateway.jobs.store import CHECKPOINTS, EVENTS, JobStore
from shared.errors import ConfigurationError
from tests.unit.gateway.jobs.support import new_job, running_job


def opened(folder: Path) -> JobStore:
    found = JobStore(folder)
    found.load()
    return found


def test_jobs_come_back_as_they_were_in_the_order_of_their_creation(tmp_path: Path) -> None:
    jobs = [running_job(id=f"ftjob-0{5 - n}", number=n, metadata={"a": "ü"}) for n in range(3)]
    kept = opened(tmp_path)
    for job in reversed(jobs):
        kept.write(job, {})
    assert JobStore(tmp_path).load() == jobs


def test_lists_grow_and_are_read_in_part(tmp_path: Path) -> None:
    kept, job = opened(tmp_path), new_job()
    kept.write(job.model_copy(update={"num_events": 2}), {EVENTS: [b"0", b"1"]})
    kept.write(job.model_copy(update={"num_events": 3}), {EVENTS: [b"2"], CHECKPOINTS: []})
    assert kept.lines(job.id, EVENTS, range(2, 0, -1)) == [b"2\n", b"1\n"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_save_that_fails_changes_nothing_and_can_be_made_again(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = opened(tmp_path)
    job = new_job(num_events=1)
    kept.write(job, {EVENTS: [b"0"]})
    grown = job.model_copy(update={"num_events": 2, "seed": 9})

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refuse) if fails == "fsync" else broken.setattr(Path, "replace", refuse)
        with pytest.raises(OSError):
            kept.write(grown, {EVENTS: [b"1, torn"]})
    assert JobStore(tmp_path).load() == [job]
    for again in (kept, opened(tmp_path)):
        again.write(grown, {EVENTS: [b"1"]})
        assert again.lines(job.id, EVENTS, range(2)) == [b"0\n", b"1\n"]
        again.write(job, {})
        again = opened(tmp_path)


def test_a_removed_job_leaves_nothing(tmp_path: Path) -> None:
    kept = opened(tmp_path)
    kept.write(new_job(), {EVENTS: [b"0"], CHECKPOINTS: [b"0"]})
    kept.remove(new_job().id)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_job_is_named(tmp_path: Path) -> None:
    (tmp_path / "ftjob-1.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"ftjob-1\.json"):
        JobStore(tmp_path).load()
