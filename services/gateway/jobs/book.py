"""All jobs of a run: what happens to them here, and what of it the disk holds."""

import asyncio
from collections.abc import Iterator
from functools import partial

from pydantic_core import to_json

from services.gateway.jobs import objects, transitions
from services.gateway.jobs.happenings import Happening
from services.gateway.jobs.job import Job
from services.gateway.jobs.store import CHECKPOINTS, EVENTS, LISTS, VERDICTS, JobStore
from services.gateway.jobs.transitions import Outcome
from services.gateway.jobs.verdicts import after_verdicts
from shared.clock import Clock
from shared.disk import on_disk
from shared.messages.weights import WeightsStatus

_Lines = dict[str, list[bytes]]
"""New lines of a job's lists, by name."""


class JobBook:
    """The jobs in memory, where everything changes at once; `save` writes them to the disk."""

    def __init__(self, store: JobStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._unsaved: dict[str, _Lines] = {}
        self._saving = asyncio.Lock()
        self.next_number = 1
        """The number of the next job."""

    def load(self) -> None:
        """Go on from the jobs on the disk; blocks. Raises ConfigurationError."""
        self._jobs = {job.id: job for job in self._store.load()}
        self.next_number = max((job.number for job in self._jobs.values()), default=0) + 1

    def __iter__(self) -> Iterator[Job]:
        """The jobs, oldest first."""
        return iter(list(self._jobs.values()))

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._jobs

    def __getitem__(self, job_id: str) -> Job:
        return self._jobs[job_id]

    def add(self, job: Job) -> Job:
        """Add a new job."""
        self.next_number = job.number + 1
        return self._take(transitions.created(job))

    def happen(self, job_id: str, happening: Happening) -> Job:
        """Apply an event to a job; returns the job after it."""
        return self._become(job_id, transitions.after(self._jobs[job_id], happening, self._now_s))

    def judge(self, job_id: str, status: WeightsStatus) -> Job:
        """Apply what the trainer tells of all weights; returns the job after it."""
        return self._become(job_id, after_verdicts(self._jobs[job_id], status, self._now_s))

    async def save(self) -> None:
        """Write all changes so far. Raises OSError; unsaved changes stay so."""
        async with self._saving:
            for job_id in list(self._unsaved):
                unsaved = self._unsaved.pop(job_id)
                try:
                    await on_disk(partial(self._store.write, self._jobs[job_id], unsaved))
                except BaseException:
                    since = self._unsaved.get(job_id, _no_lines())
                    self._unsaved[job_id] = {name: unsaved[name] + since[name] for name in LISTS}
                    raise

    async def remove(self, job_id: str) -> None:
        """Forget a job. Raises OSError."""
        async with self._saving:
            await on_disk(partial(self._store.remove, job_id))
            self.drop(job_id)

    def drop(self, job_id: str) -> None:
        """Forget a job that the disk does not hold."""
        del self._jobs[job_id]
        self._unsaved.pop(job_id, None)

    async def lines(self, job_id: str, name: str, numbers: range) -> list[bytes]:
        """Lines of one of the job's lists, each a JSON object. Raises OSError."""
        await self.save()
        return await on_disk(partial(self._store.lines, job_id, name, numbers))

    @property
    def _now_s(self) -> int:
        return int(self._clock.wall_s())

    def _become(self, job_id: str, outcome: Outcome) -> Job:
        return self._jobs[job_id] if outcome.job is self._jobs[job_id] else self._take(outcome)

    def _take(self, outcome: Outcome) -> Job:
        before, now_s = outcome.job, self._now_s
        unsaved = self._unsaved.setdefault(before.id, _no_lines())
        for number, note in enumerate(outcome.notes, start=before.num_events):
            unsaved[EVENTS].append(to_json(objects.event(before, number, note, now_s)))
        for number, saved in enumerate(outcome.saved, start=before.num_checkpoints):
            unsaved[CHECKPOINTS].append(to_json(objects.checkpoint(before, number, saved, now_s)))
        unsaved[VERDICTS] += map(to_json, outcome.verdicts)
        self._jobs[before.id] = transitions.counted(outcome)
        return self._jobs[before.id]


def _no_lines() -> _Lines:
    return {name: [] for name in LISTS}
