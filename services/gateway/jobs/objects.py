"""A job, its events and its checkpoints as OpenAI's objects."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel

from services.gateway.jobs.job import (
    DpoHyperparameters,
    Hyperparameters,
    Job,
    JobError,
    Level,
    Note,
    SavedSteps,
    Status,
    VersionVerdict,
    estimated_finish,
)
from services.gateway.jobs.paging import Listed
from services.gateway.jobs.verdicts import metrics_of

ORGANIZATION_ID = "org-lemix"
"""OpenAI's objects have one; there are none here."""


class Supervised(BaseModel):
    """How a supervised job trains."""

    hyperparameters: Hyperparameters


class Dpo(BaseModel):
    """How a job with preferences trains."""

    hyperparameters: DpoHyperparameters


class Method(BaseModel):
    """The newer place of hyperparameters; the one of its type is given."""

    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None


class VersionsOfJob(BaseModel):
    """The weights versions that its first and its last step made."""

    first: int | None
    last: int | None


class CostOfJob(BaseModel):
    """The requests that were answered beside its batches, and those among them that were late."""

    late_requests: int
    requests: int


class OfLemix(BaseModel):
    """LeMix's additions to OpenAI's job."""

    weights_version: VersionsOfJob
    lag: int
    """Batches that are published and not yet applied."""
    preemptions: int
    """How often one of its batches had to wait for requests."""
    slo_cost: CostOfJob


class FineTuningJob(Listed):
    """OpenAI's `fine_tuning.job`; times are Unix seconds."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str = ORGANIZATION_ID
    status: Status
    training_file: str
    validation_file: None = None
    hyperparameters: Hyperparameters
    method: Method
    trained_tokens: int | None
    result_files: tuple[str, ...] = ()
    seed: int
    estimated_finish: int | None
    error: JobError | None
    metadata: dict[str, str] | None
    integrations: tuple[Any, ...] = ()
    lemix: OfLemix


class JobEvent(Listed):
    """OpenAI's `fine_tuning.job.event`."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Level
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, int | float]


class WeightsOfCheckpoint(BaseModel):
    """The weights of a checkpoint, and what a guard thinks of them."""

    node: int
    weights_version: int
    why_withheld: str | None = None
    """Null: not judged, or there is no guard; empty: the version is served."""


class JobCheckpoint(Listed):
    """OpenAI's `fine_tuning.job.checkpoint`."""

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, int | float]
    lemix: WeightsOfCheckpoint | None = None
    """Null: an older gateway has noted it."""


def job_object(job: Job, now_s: float) -> FineTuningJob:
    """The job as it is now."""
    return FineTuningJob(
        id=job.id,
        created_at=job.created_at,
        finished_at=job.finished_at,
        model=job.model,
        fine_tuned_model=job.model if job.status == "succeeded" else None,
        status=job.status,
        training_file=job.training_file,
        hyperparameters=job.hyperparameters,
        method=_method(job),
        trained_tokens=job.trained_tokens if job.has_ended else None,
        seed=job.seed,
        estimated_finish=estimated_finish(job, now_s),
        error=job.error,
        metadata=job.metadata,
        lemix=OfLemix(
            weights_version=VersionsOfJob(first=job.first_version, last=job.last_version),
            lag=job.lag,
            preemptions=job.preemptions,
            slo_cost=CostOfJob(late_requests=job.late_requests, requests=job.requests),
        ),
    )


def _method(job: Job) -> Method:
    if job.beta is None:
        return Method(type="supervised", supervised=Supervised(hyperparameters=job.hyperparameters))
    chosen = DpoHyperparameters(**job.hyperparameters.model_dump(), beta=job.beta)
    return Method(type="dpo", dpo=Dpo(hyperparameters=chosen))


def event_id(job: Job, number: int) -> str:
    """The id of the job's event `number`, from 0."""
    return f"ftevent-{_suffix(job)}-{number}"


def checkpoint_id(job: Job, number: int) -> str:
    """The id of the job's checkpoint `number`, from 0."""
    return f"ftckpt-{_suffix(job)}-{number}"


def event(job: Job, number: int, note: Note, now_s: int) -> JobEvent:
    """The job's event `number`, from 0."""
    return JobEvent(
        id=event_id(job, number),
        created_at=now_s,
        level=note.level,
        message=note.message,
        type="message" if note.metrics is None else "metrics",
        data=note.metrics or {},
    )


def checkpoint(job: Job, number: int, saved: SavedSteps, now_s: int) -> JobCheckpoint:
    """The job's checkpoint `number`, from 0."""
    metrics = {"step": saved.step_number, "train_loss": saved.train_loss}
    return JobCheckpoint(
        id=checkpoint_id(job, number),
        created_at=now_s,
        fine_tuned_model_checkpoint=f"{job.model}:weights-{saved.version}",
        fine_tuning_job_id=job.id,
        step_number=saved.step_number,
        metrics={name: value for name, value in metrics.items() if value is not None},
        lemix=WeightsOfCheckpoint(node=saved.node, weights_version=saved.version),
    )


def judged(checkpoint: JobCheckpoint, verdicts: Iterable[VersionVerdict]) -> JobCheckpoint:
    """The checkpoint with the losses of its version, once a guard has found them."""
    weights = checkpoint.lemix
    if weights is None:
        return checkpoint
    of_version = (each for each in verdicts if each.version == weights.weights_version)
    found = next((each for each in of_version if each.node in (None, weights.node)), None)
    if found is None:
        return checkpoint
    told = weights.model_copy(update={"why_withheld": found.why_withheld})
    metrics = metrics_of(found) | checkpoint.metrics
    return checkpoint.model_copy(update={"metrics": metrics, "lemix": told})


def _suffix(job: Job) -> str:
    return job.id.removeprefix("ftjob-")
