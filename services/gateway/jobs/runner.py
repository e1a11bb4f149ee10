"""Runs jobs: reads their files, keeps a few batches ahead of the trainer, follows what becomes of them."""

import asyncio
import logging
import math
from contextlib import suppress

from services.gateway.http.errors import ApiError
from services.gateway.jobs.book import JobBook
from services.gateway.jobs.files import FileStore
from services.gateway.jobs.happenings import (
    Failed,
    Happening,
    Published,
    RequestAnswered,
    Started,
    ToPublish,
    Unknown,
    Validated,
)
from services.gateway.jobs.job import Job, JobError, job_of
from services.gateway.jobs.job_overlap import JobOverlap
from services.gateway.jobs.training_file import (
    AbandonedError,
    InvalidFileError,
    TrainingFile,
    read_training_file,
)
from services.gateway.jobs.transitions import due
from services.gateway.jobs.verdict_watch import VerdictWatch
from services.gateway.record import FirstTokens
from services.gateway.settings import GatewaySettings
from shared.bus.base import Bus, Incoming
from shared.clock import Clock
from shared.encoding import ExampleEncoder
from shared.errors import BusError, MessageTooLargeError
from shared.messages.cluster import StatusRequest
from shared.messages.training import (
    MAX_BATCHES_OF_MESSAGE,
    BatchDurable,
    BatchesAsked,
    BatchEvent,
    BatchProgress,
)
from shared.subjects import BATCHES, STATUS, TRAIN_PROGRESS, TRAIN_STATUS

LOOK_EVERY_S = 1.0
"""How often to look what is to be done when nothing happens."""
OBJECTIVE_EVERY_S = 5.0
"""How often the scheduler is asked for its objective while a job runs."""
ASK_TIMEOUT_S = 2.0

log = logging.getLogger(__name__)


class JobRunner:
    """Looks at every job whenever something has happened, in one loop."""

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        bus: Bus,
        clock: Clock,
        files: FileStore,
        book: JobBook,
        encoder: ExampleEncoder,
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._clock = clock
        self._files = files
        self._book = book
        self._encoder = encoder
        self._contents: dict[str, TrainingFile] = {}
        """The files of the jobs that run, and of no others."""
        self._reading: asyncio.Task[None] | None = None
        self._stopping = False
        self._quiet_since_s: dict[str, float] = {}
        """When each job last heard of its batches, or asked; without an entry it asks at once."""
        self._overlap = JobOverlap()
        self._verdicts = VerdictWatch(book, bus=bus, clock=clock)
        self._objective_s = 0.0
        """The scheduler's, for the time to first token; 0: not known."""
        self._objective_at_s = -math.inf
        self.changed = asyncio.Event()
        """Set when the runner should look at the jobs again."""

    async def run(self) -> None:
        """Run jobs until cancelled."""
        progress = await self._bus.subscribe(TRAIN_PROGRESS.at(), self._on_progress)
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    self.changed.clear()
                    await self._look(tasks)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_EVERY_S):
                            await self.changed.wait()
        finally:
            await progress.unsubscribe()

    def stop(self) -> None:
        """Stop waiting; a file that is being read is left."""
        self._stopping = True

    def first_tokens(self, answered: FirstTokens) -> None:
        """Note that a request has its first tokens: jobs whose batches were in its way count it."""
        if self._objective_s <= 0:
            return
        is_late = answered.at_s - answered.arrived_s > self._objective_s
        for job_id in self._overlap.during(answered.nodes, answered.arrived_s):
            self._book.happen(job_id, RequestAnswered(is_late))

    def forget(self, job_id: str) -> None:
        """Forget a removed job."""
        self._contents.pop(job_id, None)
        self._quiet_since_s.pop(job_id, None)
        self._overlap.forget(job_id)

    async def _look(self, tasks: asyncio.TaskGroup) -> None:
        self._take_turns()
        self._read_next(tasks)
        for job in self._book:
            await self._publish(job.id)
            await self._ask_after_silence(job.id)
        await self._verdicts.look()
        await self._learn_objective()
        await self._save()

    def _take_turns(self) -> None:
        """Start the oldest waiting jobs, and keep the contents of running ones alone."""
        num_running = sum(job.status == "running" for job in self._book)
        waiting = (job for job in self._book if job.status == "queued")
        for _ in range(self._settings.max_running_jobs - num_running):
            if (job := next(waiting, None)) is not None:
                self._book.happen(job.id, Started())
        self._contents = {
            job.id: self._contents[job.id]
            for job in self._book
            if job.status == "running" and job.id in self._contents
        }

    def _read_next(self, tasks: asyncio.TaskGroup) -> None:
        """Read one file at a time: that of the first job that cannot go on without it."""
        if self._reading is not None and not self._reading.done():
            return
        needs = (job for job in self._book if self._needs_content(job))
        if (job := next(needs, None)) is not None:
            self._reading = tasks.create_task(self._read(job))

    def _needs_content(self, job: Job) -> bool:
        is_due = due(job, self._settings.max_batches_ahead) is not None
        return job.status == "validating_files" or (is_due and job.id not in self._contents)

    async def _read(self, job: Job) -> None:
        try:
            content = await asyncio.to_thread(self._read_content, job)
        except InvalidFileError as error:
            self._happen(job.id, Failed(error.error))
            return
        except AbandonedError:
            self.changed.set()
            return
        self._contents[job.id] = content
        if job.status == "validating_files":
            self._happen(job.id, Validated(len(content.lines)))
        self.changed.set()

    def _read_content(self, job: Job) -> TrainingFile:
        """Read a file; blocks. Raises InvalidFileError."""
        try:
            content = self._files.path(job.training_file).read_bytes()
        except (OSError, ApiError) as error:
            raise InvalidFileError(_unreadable(job, error)) from error
        file = read_training_file(
            content,
            self._encoder,
            of_preferences=job.beta is not None,
            is_wanted=lambda: self._wants(job.id),
        )
        if job.num_examples not in (0, len(file.lines)):
            raise InvalidFileError(_unreadable(job, "it is not what it was when the job began"))
        file.check_batches(job.hyperparameters.batch_size, self._bus.max_message_bytes)
        return file

    def _wants(self, job_id: str) -> bool:
        return not self._stopping and job_id in self._book and not self._book[job_id].has_ended

    async def _publish(self, job_id: str) -> None:
        """Publish the due batches; if the bus refuses, the runner tries again at its next look."""
        while (content := self._contents.get(job_id)) is not None:
            job = self._book[job_id]
            step = due(job, self._settings.max_batches_ahead)
            if step is None:
                return
            body, num_tokens = content.batch_of(job, step)
            self._book.happen(job_id, ToPublish(step, num_tokens))
            batch_id = job.batch_id(step)
            try:
                stored = await self._bus.publish_durable(BATCHES, body, message_id=batch_id)
            except MessageTooLargeError as error:
                self._happen(job_id, Failed(JobError(code="batch_too_large", message=str(error))))
                return
            except BusError as error:
                log.warning("batch %s is not stored yet: %s", batch_id, error)
                return
            self._quiet_since_s.setdefault(job_id, self._clock.now_s())
            self._happen(job_id, Published(step, stored.sequence))

    async def _ask_after_silence(self, job_id: str) -> None:
        """Ask the trainer for the batches of which nothing was heard for a while, and for durable ones: a
        rollback may have taken them out.
        """
        if job_id not in self._book:
            return
        job = self._book[job_id]
        open_ids = [job.batch_id(number) for number, step in job.open.items() if step.sequence > 0]
        now_s = self._clock.now_s()
        is_open = bool(open_ids) or job.awaits_verdict
        if not is_open or now_s - self._quiet_since_s.get(job_id, -math.inf) < self._settings.ask_after_s:
            return
        self._quiet_since_s[job_id] = now_s
        ids = [*open_ids, *map(job.batch_id, sorted(set(job.newest_durable.values())))]
        for start in range(0, len(ids), MAX_BATCHES_OF_MESSAGE):
            await self._ask(job_id, tuple(ids[start : start + MAX_BATCHES_OF_MESSAGE]))

    async def _ask(self, job_id: str, batch_ids: tuple[str, ...]) -> None:
        try:
            now = await self._bus.request(
                TRAIN_STATUS.at(), BatchesAsked(batch_ids=batch_ids), timeout_s=ASK_TIMEOUT_S
            )
        except BusError as error:
            log.info("the trainer does not say how the batches of %s stand: %s", job_id, error)
            return
        for event in now.events:
            self._happen(job_id, event)
        for batch_id in now.unknown:
            self._happen(job_id, Unknown(batch_id, now.read_up_to))

    async def _on_progress(self, incoming: Incoming[BatchProgress]) -> None:
        event = incoming.message.event
        for job_id in {job_of(batch_id) for batch_id in _batch_ids(event)}:
            if job_id is not None and job_id in self._book:
                self._quiet_since_s[job_id] = self._clock.now_s()
                self._happen(job_id, event)

    def _happen(self, job_id: str, happening: Happening) -> None:
        if job_id not in self._book:
            return
        job = self._book.happen(job_id, happening)
        self._overlap.see(job_id, job.nodes, self._clock.now_s())
        self.changed.set()

    async def _learn_objective(self) -> None:
        now_s = self._clock.now_s()
        is_wanted = any(job.lag for job in self._book)
        if not is_wanted or now_s - self._objective_at_s < OBJECTIVE_EVERY_S:
            return
        self._objective_at_s = now_s
        try:
            status = await self._bus.request(STATUS.at(), StatusRequest(), timeout_s=ASK_TIMEOUT_S)
        except BusError as error:
            log.info("the scheduler does not tell its objective: %s", error)
            return
        self._objective_s = status.slo_s

    async def _save(self) -> None:
        try:
            await self._book.save()
        except OSError as error:
            log.error("fine-tuning jobs are not saved yet: %s", error)


def _batch_ids(event: BatchEvent) -> tuple[str, ...]:
    return event.batch_ids if isinstance(event, BatchDurable) else (event.batch_id,)


def _unreadable(job: Job, reason: object) -> JobError:
    message = f"The file {job.training_file} cannot be read: {reason}"
    return JobError(code="file_unreadable", message=message, param="training_file")
