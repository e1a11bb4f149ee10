"""A job, its events and its checkpoints as OpenAI's objects."""

from services.gateway.jobs.job import Job, Note, SavedSteps, estimated_finish
from services.gateway.openai.answers import Json

ORGANIZATION_ID = "org-lemix"
"""OpenAI's objects have one; there are none here."""


def job_object(job: Job, now_s: float) -> Json:
    """OpenAI's `fine_tuning.job`, and what LeMix adds under `lemix`."""
    hyperparameters = job.hyperparameters.model_dump()
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "model": job.model,
        "fine_tuned_model": job.model if job.status == "succeeded" else None,
        "organization_id": ORGANIZATION_ID,
        "status": job.status,
        "training_file": job.training_file,
        "validation_file": None,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "trained_tokens": job.trained_tokens if job.has_ended else None,
        "result_files": [],
        "seed": job.seed,
        "estimated_finish": estimated_finish(job, now_s),
        "error": None if job.error is None else job.error.model_dump(),
        "metadata": job.metadata,
        "integrations": [],
        "lemix": _lemix(job),
    }


def _lemix(job: Job) -> Json:
    return {
        "weights_version": {"first": job.first_version, "last": job.last_version},
        "lag": job.lag,
        "preemptions": job.preemptions,
        "slo_cost": {"late_requests": job.late_requests, "requests": job.requests},
    }


def event_id(job: Job, number: int) -> str:
    """The id of the job's event `number`, from 0."""
    return f"ftevent-{_suffix(job)}-{number}"


def checkpoint_id(job: Job, number: int) -> str:
    """The id of the job's checkpoint `number`, from 0."""
    return f"ftckpt-{_suffix(job)}-{number}"


def event(job: Job, number: int, note: Note, now_s: int) -> Json:
    """OpenAI's `fine_tuning.job.event`."""
    return {
        "id": event_id(job, number),
        "object": "fine_tuning.job.event",
        "created_at": now_s,
        "level": note.level,
        "message": note.message,
        "type": "message" if note.metrics is None else "metrics",
        "data": note.metrics or {},
    }


def checkpoint(job: Job, number: int, saved: SavedSteps, now_s: int) -> Json:
    """OpenAI's `fine_tuning.job.checkpoint`."""
    metrics = {"step": saved.step_number, "train_loss": saved.train_loss}
    return {
        "id": checkpoint_id(job, number),
        "object": "fine_tuning.job.checkpoint",
        "created_at": now_s,
        "fine_tuned_model_checkpoint": f"{job.model}:weights-{saved.version}",
        "fine_tuning_job_id": job.id,
        "step_number": saved.step_number,
        "metrics": {name: value for name, value in metrics.items() if value is not None},
    }


def _suffix(job: Job) -> str:
    return job.id.removeprefix("ftjob-")
