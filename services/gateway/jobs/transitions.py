"""Something happens to a fine-tuning job, and it becomes another. Pure.

validating_files --Validated--> queued --Started--> running --every step durable, and served--> succeeded
        |                          |                   |
        '--Failed, Cancelled-------+-------------------+--a batch rejected, or taken out again--> failed
                                                       +--nothing to train: all is held out------^
                                                       '--what it taught is withheld (`verdicts`)--^
"""

from collections.abc import Collection
from typing import NamedTuple

from services.gateway.jobs.happenings import (
    Cancelled,
    Failed,
    Happening,
    Published,
    RequestAnswered,
    Started,
    Succeeded,
    ToPublish,
    Unknown,
    Validated,
)
from services.gateway.jobs.job import ALL_HELD_OUT, Job, JobError, Note, SavedSteps, Step, VersionVerdict
from shared.messages.training import (
    BatchApplied,
    BatchDeferred,
    BatchDurable,
    BatchHeldOut,
    BatchPlaced,
    BatchRejected,
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
            return Outcome(_without_unknown(job, job.step_of(batch_id), read_up_to))
        case RequestAnswered(is_late=is_late):
            return Outcome(_with(job, requests=job.requests + 1, late_requests=job.late_requests + is_late))
        case BatchPlaced(batch_id=batch_id, node=node):
            return Outcome(_with_step(job, job.step_of(batch_id), node=node, applied_version=None))
        case BatchDeferred(batch_id=batch_id):
            is_ours = job.step_of(batch_id) in job.open
            return Outcome(_with(job, preemptions=job.preemptions + is_ours))
        case BatchApplied():
            return _applied(job, happening)
        case BatchDurable():
            return _durable(job, happening)
        case BatchRejected():
            return _rejected(job, happening, now_s)
        case BatchHeldOut(batch_id=batch_id):
            return _held_out(job, job.step_of(batch_id), now_s)


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
    number = job.step_of(applied.batch_id)
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
    told = {job.step_of(batch_id) for batch_id in durable.batch_ids}
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
    number = job.step_of(rejected.batch_id)
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
