"""Fine-tuning as the API offers it: jobs are asked for, shown and cancelled; the runner runs them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from services.gateway.access.keys import Key
from services.gateway.http.errors import ApiError, rate_limited
from services.gateway.jobs.book import JobBook
from services.gateway.jobs.files import FileDeleted, FileLimits, FileStore
from services.gateway.jobs.happenings import Cancelled
from services.gateway.jobs.job import Job, VersionVerdict
from services.gateway.jobs.objects import (
    FineTuningJob,
    JobCheckpoint,
    JobEvent,
    checkpoint_id,
    event_id,
    job_object,
    judged,
)
from services.gateway.jobs.paging import ObjectList, Page, cut, list_object
from services.gateway.jobs.requests import MAX_SEED, JobRequest
from services.gateway.jobs.runner import JobRunner
from services.gateway.jobs.store import CHECKPOINTS, EVENTS, VERDICTS, JobStore
from services.gateway.record import FirstTokens
from services.gateway.settings import GatewaySettings
from shared.bus.base import Bus
from shared.clock import Clock, IdSource
from shared.encoding import ExampleEncoder
from shared.errors import ConfigurationError

log = logging.getLogger(__name__)


class FineTuning:
    """Files and jobs of one run; live inside `running()`. One gateway at a time holds a run's jobs."""

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        bus: Bus,
        clock: Clock,
        ids: IdSource,
        encoder: ExampleEncoder,
    ) -> None:
        limits = FileLimits(max_files=settings.max_files, max_file_lines=settings.max_file_lines)
        self.files = FileStore(settings.run_dir / "files", limits, clock=clock, ids=ids)
        self._settings = settings
        self._clock = clock
        self._ids = ids
        self._model = encoder.card.name
        self._book = JobBook(JobStore(settings.run_dir / "fine_tuning"), clock)
        self._runner = JobRunner(
            settings, bus=bus, clock=clock, files=self.files, book=self._book, encoder=encoder
        )

    def load(self) -> None:
        """Go on from what an earlier gateway kept; blocks. Raises ConfigurationError."""
        try:
            self.files.load()
            self._book.load()
        except OSError as error:
            raise ConfigurationError(f"files and jobs cannot be kept: {error}") from error

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run jobs until the block ends; then have the disk hold how they stand."""
        async with asyncio.TaskGroup() as tasks:
            runner = tasks.create_task(self._runner.run())
            try:
                yield
            finally:
                self._runner.stop()
                runner.cancel()
        try:
            await self._book.save()
        except OSError as error:
            log.error("fine-tuning jobs are not saved: %s", error)

    def first_tokens(self, answered: FirstTokens) -> None:
        """A request has its first tokens."""
        self._runner.first_tokens(answered)

    async def create(self, request: JobRequest, key: Key | None) -> FineTuningJob:
        """A new job that `key` asks for. Raises ApiError when it cannot be taken."""
        if request.model != self._model:
            message = f"the model {request.model!r} does not exist"
            raise ApiError(404, message, param="model", code="model_not_found")
        await self._make_room()
        if request.training_file not in (file.id for file in self.files.all()):
            message = f"there is no file {request.training_file!r}"
            raise ApiError(400, message, param="training_file", code="file_not_found")
        job = self._book.add(
            Job(
                id=self._ids.new("ftjob"),
                number=self._book.next_number,
                created_at=int(self._clock.wall_s()),
                model=request.model,
                training_file=request.training_file,
                hyperparameters=request.asked.chosen(),
                beta=request.beta,
                seed=self._ids.seed() & MAX_SEED if request.seed is None else request.seed,
                metadata=request.metadata,
                asked_by=key.label if key else "",
            )
        )
        try:
            await self._saved()
        except ApiError:
            self._book.drop(job.id)
            raise
        self._runner.changed.set()
        return self.show(job.id)

    def show(self, job_id: str) -> FineTuningJob:
        """The job as it is now. Raises ApiError (404)."""
        return job_object(self._find(job_id), self._clock.wall_s())

    async def cancel(self, job_id: str) -> FineTuningJob:
        """Publish nothing more of the job. Raises ApiError when there is nothing to cancel."""
        job = self._find(job_id)
        if job.has_ended:
            raise ApiError(
                400, f"the job {job_id} has {job.status} already", param="id", code="job_has_ended"
            )
        self._book.happen(job_id, Cancelled())
        await self._saved()
        self._runner.changed.set()
        return self.show(job_id)

    def list_jobs(self, page: Page, wanted: Callable[[Job], bool]) -> ObjectList[FineTuningJob]:
        """The newest first. Raises ApiError."""
        jobs = [job for job in reversed(list(self._book)) if wanted(job)]
        numbers = cut([job.id for job in jobs], page)
        data = [job_object(jobs[number], self._clock.wall_s()) for number in numbers]
        return list_object(data, has_more=numbers.stop < len(jobs))

    async def list_events(self, job_id: str, page: Page) -> ObjectList[JobEvent]:
        """The newest first. Raises ApiError."""
        job = self._find(job_id)
        ids = [event_id(job, number) for number in reversed(range(job.num_events))]
        numbers = cut(ids, page)
        lines = await self._lines(job_id, EVENTS, len(ids), numbers)
        events = [JobEvent.model_validate_json(line) for line in lines]
        return list_object(events, has_more=numbers.stop < len(ids))

    async def list_checkpoints(self, job_id: str, page: Page) -> ObjectList[JobCheckpoint]:
        """The newest first. Raises ApiError."""
        job = self._find(job_id)
        ids = [checkpoint_id(job, number) for number in reversed(range(job.num_checkpoints))]
        numbers = cut(ids, page)
        lines = await self._lines(job_id, CHECKPOINTS, len(ids), numbers)
        told = await self._lines(job_id, VERDICTS, job.num_verdicts, range(job.num_verdicts))
        verdicts = [VersionVerdict.model_validate_json(line) for line in told]
        checkpoints = [judged(JobCheckpoint.model_validate_json(line), verdicts) for line in lines]
        return list_object(checkpoints, has_more=numbers.stop < len(ids))

    async def delete_file(self, file_id: str) -> FileDeleted:
        """Delete a file. Raises ApiError when there is none, or when a job still needs it."""
        self.files.find(file_id)
        needs = next((job for job in self._book if job.training_file == file_id and not job.has_ended), None)
        if needs is not None:
            message = f"the job {needs.id} still needs the file {file_id}: cancel it first"
            raise ApiError(409, message, param="id", code="file_in_use")
        await self.files.delete(file_id)
        return FileDeleted(id=file_id)

    async def _lines(self, job_id: str, name: str, num_lines: int, numbers: range) -> list[bytes]:
        """Lines of one of the job's lists; `numbers` count from its newest. Raises ApiError (503)."""
        newest = num_lines - 1
        places = range(newest - numbers.start, newest - numbers.stop, -1)
        try:
            return await self._book.lines(job_id, name, places)
        except OSError as error:
            raise ApiError(503, f"the {name} of {job_id} cannot be read: {error.strerror}") from error

    def _find(self, job_id: str) -> Job:
        if job_id not in self._book:
            raise ApiError(404, f"no such fine-tuning job: {job_id!r}", param="id", code="job_not_found")
        return self._book[job_id]

    async def _make_room(self) -> None:
        """Forget the oldest job that has ended when as many are kept as may be."""
        if sum(1 for _ in self._book) < self._settings.max_jobs:
            return
        ended = next((job for job in self._book if job.has_ended), None)
        if ended is None:
            raise rate_limited(f"{self._settings.max_jobs} fine-tuning jobs wait or run already")
        try:
            await self._book.remove(ended.id)
        except OSError as error:
            raise ApiError(503, f"no room can be made for the job: {error.strerror}") from error
        self._runner.forget(ended.id)

    async def _saved(self) -> None:
        try:
            await self._book.save()
        except OSError as error:
            raise ApiError(503, f"the job cannot be saved: {error.strerror}") from error
