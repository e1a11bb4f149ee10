"""The decisions of a node, as actions to carry out in order."""

from collections.abc import Mapping
from dataclasses import dataclass

from services.trainer.publication.publishing import PublishingAction
from shared.messages.training import ShardSaved


@dataclass(frozen=True, slots=True)
class Feed:
    """Send all microbatches of this batch to stage 0."""

    batch_id: str


@dataclass(frozen=True, slots=True)
class StepsAhead:
    """Tell stage 0 how to step on a batch, before its gradients are there."""

    batch_id: str
    version: int
    """The version of the weights afterwards."""
    is_kept: bool = False
    """Stages keep the version, to serve it."""


@dataclass(frozen=True, slots=True)
class Step:
    """Order every stage to step on a batch, or to skip it."""

    batch_id: str
    version: int
    """The version of the weights afterwards."""
    gradient_scale: float = 1.0
    is_skipped: bool = False
    rate_of: tuple[str, ...] = ()
    """The batches whose mean learning rate is the step's, when it is not this one alone: nodes that step
    together step alike."""
    is_kept: bool = False
    """Stages keep the version, to serve it."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """No stage's weights contain the batch, nor ever will: its gradients were not finite."""

    batch_id: str
    loss: float


@dataclass(frozen=True, slots=True)
class Halted:
    """The node trains no more until a restart or a rollback, and goes on serving."""

    reason: str
    unfinished: tuple[str, ...] = ()
    """Batches that were placed here and have not begun, in order: others may run them."""


@dataclass(frozen=True, slots=True)
class Applied:
    """All stages' weights contain the batch."""

    batch_id: str
    version: int
    loss: float


@dataclass(frozen=True, slots=True)
class Restore:
    """Have every stage hold the node's durable checkpoint; answer with `restored`."""

    fence: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class RequestSave:
    """Ask every stage for its share of a checkpoint; answer with `save_answered`."""

    fence: int
    version: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class WriteCheckpoint:
    """Make the shards a durable checkpoint; answer with `checkpoint_written`."""

    version: int
    num_stages: int
    shards: Mapping[int, ShardSaved]


@dataclass(frozen=True, slots=True)
class SaveAbandoned:
    """There will be no checkpoint of `version` now."""

    version: int
    reason: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The node is fed no more: what is not durable there must be run again."""

    reason: str
    unfinished: tuple[str, ...]
    """Batches that were placed here and not applied, in order."""
    failed: str | None = None
    """The batch whose own fault it seems to be."""
    unfit: str | None = None
    """The batch that found no memory."""


@dataclass(frozen=True, slots=True)
class RollBack:
    """Make an older durable checkpoint the node's newest, and discard what later ones contain; answer with
    `rolled_back`."""

    version: int
    unfinished: tuple[str, ...]
    """Batches that were placed here and not applied, in order: they must be run again."""


Action = (
    Feed
    | StepsAhead
    | Step
    | Applied
    | Skipped
    | Halted
    | Restore
    | RequestSave
    | WriteCheckpoint
    | SaveAbandoned
    | Closed
    | RollBack
    | PublishingAction
)
