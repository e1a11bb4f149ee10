"""A fine-tuning job as plain state: something happens to it, and it becomes another. Pure.

validating_files --Validated--> queued --Started--> running --every step durable, and served--> succeeded
        |                          |                   |
        '--Failed, Cancelled-------+-------------------+--a batch rejected, or taken out again--> failed
                                                       +--nothing to train: all is held out------^
                                                       '--what it taught is withheld (`verdicts`)--^

A step is one training batch: `open` from when it is to be published until a durable checkpoint contains it.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from shared.messages.training import (
    BatchApplied,
    BatchDeferred,
    BatchDurable,
    BatchEvent,
    BatchHeldOut,
    BatchPlaced,
    BatchRejected,
)

Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]

_BATCH_ID = re.compile(r"(ftjob-[0-9a-f]+)-e([0-9]+)-b([0-9]+)")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hyperparameters(_Frozen):
    """The values that a job trains with; nothing is left to be chosen."""

    n_epochs: int
    batch_size: int
    """Examples of a step; the last step of an epoch may have fewer."""
    learning_rate_multiplier: float


class DpoHyperparameters(Hyperparameters):
    """The values that a job with preferences trains with."""

    beta: float
    """How closely the weights are held to the model as it was given."""


class JobError(_Frozen):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


ALL_HELD_OUT = JobError(
    code="all_held_out",
    message=(
        "Nothing was trained: all examples of the file are held out, to judge versions by "
        "(LEMIX_HOLD_OUT_SHARE), and train in no job of this run. Make a job with more examples, or with "
        "others: docs/versions.md"
    ),
    param="training_file",
)


class Step(_Frozen):
    """A step that is not durable yet."""

    num_tokens: int
    sequence: int = 0
    """Its place in the training stream; 0: it is to be published (again)."""
    node: int | None = None
    """Where it was placed."""
    applied_version: int | None = None
    """Weights version that it made on that node; None: it is not applied."""


class Note(_Frozen):
    """An entry of the job's log of events."""

    level: Level
    message: str
    metrics: dict[str, int | float] | None = None


class SavedSteps(_Frozen):
    """A durable checkpoint contains steps of the job."""

    step_number: int
    """The highest of them."""
    node: int
    version: int
    train_loss: float | None
    """The loss of the newest step whose loss is known."""


class VersionVerdict(_Frozen):
    """A guard's verdict on a version that holds steps of the job. Losses are in nats; None: not known."""

    node: int | None
    """None: the nodes are one model."""
    version: int
    train_loss: float | None
    held_out_loss: float | None
    samples_loss: float | None
    why_withheld: str
    """Empty: it serves."""


class Job(_Frozen):
    """One job; times are Unix seconds."""

    id: str
    number: int
    """Counts the jobs of a run, in the order of their creation."""
    created_at: int
    model: str
    training_file: str
    hyperparameters: Hyperparameters
    beta: float | None = None
    """Given where the job learns preferences, by method `dpo`; else it is supervised."""
    seed: int
    metadata: dict[str, str] | None = None
    asked_by: str = ""
    """The API key that asked for it, as people know it; empty: there were no keys."""
    status: Status = "validating_files"
    started_at: int | None = None
    finished_at: int | None = None
    error: JobError | None = None
    num_examples: int = 0
    """0 until the file is validated."""
    open: dict[int, Step] = {}
    """By number, from 1."""
    next_step: int = 1
    """The lowest that was never to be published."""
    newest_durable: dict[int, int] = {}
    """The highest durable step of each node that has one: what a rollback there takes out first."""
    durable_versions: dict[int, int] = {}
    """The lowest version known to have that step durably."""
    judged_versions: dict[int, int] = {}
    """The newest version of each node on which the guard's verdict is known."""
    durable_tokens: int = 0
    train_loss: float | None = None
    """The loss of the newest step."""
    first_version: int | None = None
    last_version: int | None = None
    preemptions: int = 0
    requests: int = 0
    late_requests: int = 0
    num_events: int = 0
    num_checkpoints: int = 0
    num_verdicts: int = 0

    @property
    def has_ended(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")

    @property
    def awaits_verdict(self) -> bool:
        """Whether every step is durable, and it is not known yet that a version with all of them serves."""
        return self.status == "running" and not self.open and self.next_step > self.total_steps

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_examples // self.hyperparameters.batch_size)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.hyperparameters.n_epochs

    @property
    def unapplied(self) -> list[int]:
        """Steps that are published, or are to be, and not in any node's weights."""
        return [number for number, step in self.open.items() if step.applied_version is None]

    @property
    def lag(self) -> int:
        """Batches published and not applied."""
        return sum(self.open[number].sequence > 0 for number in self.unapplied)

    @property
    def num_applied(self) -> int:
        """Steps that are in some node's weights."""
        return self.next_step - 1 - len(self.unapplied)

    @property
    def trained_tokens(self) -> int:
        """Tokens of all steps that are applied."""
        applied = (step for step in self.open.values() if step.applied_version is not None)
        return self.durable_tokens + sum(step.num_tokens for step in applied)

    @property
    def nodes(self) -> set[int]:
        """Nodes that compute on the job's batches."""
        placed = (self.open[number].node for number in self.unapplied)
        return {node for node in placed if node is not None}

    @property
    def producer(self) -> str:
        """Whom the lineage of weights names for the job's batches."""
        return f"{self.id}, key {self.asked_by}" if self.asked_by else self.id

    def batch_id(self, step: int) -> str:
        """The id of the step's batch: the same at every publication, so that it is applied once."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        return f"{self.id}-e{epoch + 1}-b{place + 1:05}"


def job_of(batch_id: str) -> str | None:
    """The job that a batch is of; None when it is of no job."""
    match = _BATCH_ID.fullmatch(batch_id)
    return match[1] if match else None


@dataclass(frozen=True, slots=True)
class Validated:
    """The training file was checked: every line can be learnt from."""

    num_examples: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The job cannot go on."""

    error: JobError


@dataclass(frozen=True, slots=True)
class Started:
    """The job begins: it is its turn."""


@dataclass(frozen=True, slots=True)
class Succeeded:
    """Every step is durable, and a version with all of them may serve."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Somebody cancelled the job."""


@dataclass(frozen=True, slots=True)
class ToPublish:
    """The step is about to be published: events of its batch count from now on."""

    step: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Published:
    """The step's batch is stored in the training stream."""

    step: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """The trainer, which has read the stream up to `read_up_to`, knows nothing of a batch."""

    batch_id: str
    read_up_to: int


@dataclass(frozen=True, slots=True)
class RequestAnswered:
    """A request had its first token from a node that computed on the job's batches meanwhile."""

    is_late: bool


Happening = (
    Validated
    | Failed
    | Started
    | Succeeded
    | Cancelled
    | ToPublish
    | Published
    | Unknown
    | RequestAnswered
    | BatchEvent
)


class Outcome(NamedTuple):
    """The job after an event, with new entries for its log and its other lists."""

    job: Job
    notes: tuple[Note, ...] = ()
    saved: tuple[SavedSteps, ...] = ()
    verdicts: tuple[VersionVerdict, ...] = ()


def created(job: Job) -> Outcome:
    """A job that has just been asked for."""
    return Outcome(
        job,
        (
            Note(level="info", message=f"Created fine-tuning job: {job.id}"),
            Note(level="info", message=f"Validating training file: {job.training_file}"),
        ),
    )


def due(job: Job, window: int) -> int | None:
    """The step to publish now; at most `window` are published and not applied."""
    if job.status != "running":
        return None
    again = next((number for number, step in job.open.items() if step.sequence == 0), None)
    if again is not None:
        return again
    has_room = len(job.unapplied) < window and job.next_step <= job.total_steps
    return job.next_step if has_room else None


def after(job: Job, happening: Happening, now_s: int) -> Outcome:
    """The job after an event; events that do not concern it, or come again, change nothing."""
    match happening:
        case Validated() | Failed() | Started() | Succeeded() | Cancelled():
            return Outcome(job) if job.has_ended else _moved_on(job, happening, now_s)
        case ToPublish(step=number, num_tokens=num_tokens):
            opened = {**job.open, number: Step(num_tokens=num_tokens)}
            return Outcome(_with(job, open=opened, next_step=max(job.next_step, number + 1)))
        case Published(step=number, sequence=sequence):
            return Outcome(_with_step(job, number, sequence=sequence))
        case Unknown(batch_id=batch_id, read_up_to=read_up_to):
            return Outcome(_without_unknown(job, _step_of(job, batch_id), read_up_to))
        case RequestAnswered(is_late=is_late):
            return Outcome(_with(job, requests=job.requests + 1, late_requests=job.late_requests + is_late))
        case BatchPlaced(batch_id=batch_id, node=node):
            return Outcome(_with_step(job, _step_of(job, batch_id), node=node, applied_version=None))
        case BatchDeferred(batch_id=batch_id):
            is_ours = _step_of(job, batch_id) in job.open
            return Outcome(_with(job, preemptions=job.preemptions + is_ours))
        case BatchApplied():
            return _applied(job, happening)
        case BatchDurable():
            return _durable(job, happening)
        case BatchRejected():
            return _rejected(job, happening, now_s)
        case BatchHeldOut(batch_id=batch_id):
            return _held_out(job, _step_of(job, batch_id), now_s)


def _moved_on(
    job: Job, happening: Validated | Failed | Started | Succeeded | Cancelled, now_s: int
) -> Outcome:
    match happening:
        case Validated(num_examples=num_examples):
            note = Note(level="info", message="Files validated, moving job to queued state")
            return Outcome(_with(job, status="queued", num_examples=num_examples), (note,))
        case Started():
            note = Note(level="info", message="Fine-tuning job started")
            return Outcome(_with(job, status="running", started_at=now_s), (note,))
        case Failed(error=error):
            note = Note(level="error", message=error.message)
            return Outcome(_with(job, status="failed", error=error, finished_at=now_s), (note,))
        case Succeeded():
            note = Note(level="info", message="The job has successfully completed")
            return Outcome(_with(job, status="succeeded", finished_at=now_s), (note,))
        case Cancelled():
            note = Note(level="info", message="The job was cancelled")
            return Outcome(_with(job, status="cancelled", finished_at=now_s), (note,))


def _applied(job: Job, applied: BatchApplied) -> Outcome:
    number = _step_of(job, applied.batch_id)
    if number not in job.open or job.open[number].applied_version == applied.version:
        return Outcome(job)
    versions = [version for version in (job.first_version, job.last_version) if version is not None]
    grown = _with(
        _with_step(job, number, node=applied.node, applied_version=applied.version),
        train_loss=applied.loss,
        first_version=min([*versions, applied.version]),
        last_version=max([*versions, applied.version]),
    )
    note = Note(
        level="info",
        message=f"Step {number}/{job.total_steps}: training loss={applied.loss:.4f}",
        metrics={"step": number, "train_loss": applied.loss, "total_steps": job.total_steps},
    )
    return Outcome(grown, (note,))


def _durable(job: Job, durable: BatchDurable) -> Outcome:
    told = {_step_of(job, batch_id) for batch_id in durable.batch_ids}
    job = _known_by(job, durable.version, told)
    numbers = {number for number in told if number in job.open}
    if not numbers:
        return Outcome(job)
    num_tokens = sum(job.open[number].num_tokens for number in numbers)
    left = {number: step for number, step in job.open.items() if number not in numbers}
    newest = max(*numbers, job.newest_durable.get(durable.node, 0))
    job = _with(
        job,
        open=left,
        newest_durable={**job.newest_durable, durable.node: newest},
        durable_versions={**job.durable_versions, durable.node: durable.version},
        durable_tokens=job.durable_tokens + num_tokens,
    )
    saved = SavedSteps(
        step_number=max(numbers), node=durable.node, version=durable.version, train_loss=job.train_loss
    )
    note = Note(level="info", message=f"Checkpoint created at step {saved.step_number}")
    return Outcome(job, (note,), (saved,))


def _known_by(job: Job, version: int, numbers: Collection[int | None]) -> Job:
    """The job after it is told that a durable version has these steps; a rollback may go to a lower one."""
    lower = {
        node: version
        for node, known in job.durable_versions.items()
        if version < known and job.newest_durable[node] in numbers
    }
    return _with(job, durable_versions=job.durable_versions | lower) if lower else job


def _rejected(job: Job, rejected: BatchRejected, now_s: int) -> Outcome:
    number = _step_of(job, rejected.batch_id)
    if number not in job.open:
        is_ours = number is not None and 0 < number < job.next_step
        message = f"Step {number}, which was durable, is in the weights no longer: {rejected.reason}"
        discarded = Failed(JobError(code="step_discarded", message=message))
        return after(job, discarded, now_s) if is_ours else Outcome(job)
    error = JobError(
        code="batch_rejected",
        message=f"Step {number} was rejected: {rejected.reason}",
        param="training_file",
    )
    return after(_without(job, number), Failed(error), now_s)


def _held_out(job: Job, number: int | None, now_s: int) -> Outcome:
    if number not in job.open:
        return Outcome(job)
    message = f"Step {number}/{job.total_steps}: all of its examples are held out (LEMIX_HOLD_OUT_SHARE)"
    note = Note(level="info", message=message)
    job = _without(job, number)
    if not job.awaits_verdict or job.newest_durable:
        return Outcome(job, (note,))
    failed = after(job, Failed(ALL_HELD_OUT), now_s)
    return failed._replace(notes=(note, *failed.notes))


def _without_unknown(job: Job, number: int | None, read_up_to: int) -> Job:
    """Publish batches again that the trainer has passed by; drop those that are no longer wanted."""
    if number not in job.open or job.open[number].sequence > read_up_to:
        return job
    if job.has_ended:
        return _without(job, number)
    return _with_step(job, number, sequence=0, node=None, applied_version=None)


def _step_of(job: Job, batch_id: str) -> int | None:
    match = _BATCH_ID.fullmatch(batch_id)
    if match is None or match[1] != job.id:
        return None
    return (int(match[2]) - 1) * job.steps_per_epoch + int(match[3])


def _with_step(job: Job, number: int | None, **changes: object) -> Job:
    if number not in job.open:
        return job
    changed = job.open[number].model_copy(update=changes)
    return _with(job, open={**job.open, number: changed})


def _without(job: Job, number: int | None) -> Job:
    return _with(job, open={other: step for other, step in job.open.items() if other != number})


def _with(job: Job, **changes: object) -> Job:
    assert changes.keys() <= Job.model_fields.keys()
    return job.model_copy(update=changes)


def counted(outcome: Outcome) -> Job:
    """The job with its new entries counted."""
    job, notes, saved, verdicts = outcome
    return _with(
        job,
        num_events=job.num_events + len(notes),
        num_checkpoints=job.num_checkpoints + len(saved),
        num_verdicts=job.num_verdicts + len(verdicts),
    )


def estimated_finish(job: Job, now_s: float) -> int | None:
    """When the job will have finished if it goes on as so far; None while nothing can be said."""
    if job.status != "running" or job.started_at is None or not job.num_applied:
        return None
    seconds_per_step = max(0.0, now_s - job.started_at) / job.num_applied
    return int(now_s + seconds_per_step * (job.total_steps - job.num_applied))


def matches(job: Job, metadata: Mapping[str, str] | None) -> bool:
    """Whether the job has all of this metadata; None asks for jobs without any."""
    if metadata is None:
        return not job.metadata
    return metadata.items() <= (job.metadata or {}).items()
