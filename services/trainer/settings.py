"""Settings of the trainer."""

from typing import Literal

from pydantic import Field

from shared.settings import LemixSettings


class TrainerSettings(LemixSettings):
    """How batches become microbatches, steps and checkpoints."""

    schedule: Literal["async", "sync"] = "async"
    """`async` (A-PP): no flush between batches; `sync` (S-PP): a batch waits for the step of the last."""
    microbatches: int = Field(default=4, ge=1)
    """Parts that a batch is cut into; more when they would be too large."""
    max_microbatch_tokens: int = Field(default=2048, ge=2, le=65_536)
    """Tokens in a microbatch at most; the upper limit keeps its message below 1 MiB."""
    learning_rate: float = Field(default=1e-3, ge=0)
    checkpoint_every: int = Field(default=16, ge=1)
    """Applied batches of a node between two of its checkpoints."""
    checkpoint_idle_s: float = Field(default=2.0, ge=0)
    """A node without training for so long saves what it has learnt since its last checkpoint."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints of each node that are kept."""
    max_pending: int = Field(default=1024, ge=1)
    """Batches held until a checkpoint contains them; reading stops there while checkpoints fail."""
    train_from: Literal["first", "next"] = "first"
    """Where a run without checkpoints begins: at the `first` batch of the stream or at the `next` to come."""
