"""All that can happen to a fine-tuning job. Pure."""

from dataclasses import dataclass

from services.gateway.jobs.job import JobError
from shared.messages.training import BatchEvent


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
