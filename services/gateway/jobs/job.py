"""A fine-tuning job as plain state. Pure.

A step is one training batch: `open` from when it is to be published until a durable checkpoint contains it.
"""

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

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

    def step_of(self, batch_id: str) -> int | None:
        """The step whose batch that is; None: it is none of this job's."""
        match = _BATCH_ID.fullmatch(batch_id)
        if match is None or match[1] != self.id:
            return None
        return (int(match[2]) - 1) * self.steps_per_epoch + int(match[3])


def job_of(batch_id: str) -> str | None:
    """The job that a batch is of; None when it is of no job."""
    match = _BATCH_ID.fullmatch(batch_id)
    return match[1] if match else None


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
