"""The rules for every node. Pure."""

from dataclasses import dataclass, field
from math import inf

from services.trainer.publication.publishing import PublishingRules
from shared.schedule import Feeding, is_synchronous


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The rules for every node."""

    feeding: Feeding
    checkpoint_every: int
    checkpoint_idle_s: float
    checkpoint_bytes_per_s: float = inf
    """Checkpoints are not written faster than that, in the mean, but for those that others wait for."""
    microbatches: int = 1
    """Parts that a batch is cut into."""
    shares_weights: bool = False
    """Nodes are merged: when to save and when to restore is decided for all of them together."""
    shares_steps: bool = False
    """Gradients are averaged over the nodes: when to step is, too."""
    max_gradient_norm: float = inf
    """Gradients whose norm over all stages is larger are scaled down to it."""
    max_skips: int = 3
    """After so many batches in a row whose gradients are not finite the node trains no more."""
    publishing: PublishingRules = field(default_factory=PublishingRules)

    def num_filling(self, num_stages: int) -> int:
        """Batches that fill the pipeline: without a flush, one microbatch for each stage."""
        if is_synchronous(self.feeding.schedule):
            return 1
        return -(-num_stages // self.microbatches)

    def max_fed(self, num_stages: int) -> int:
        """Batches at stage 0 that are not done: those that fill the pipeline, and the next one.

        Not that one where a merge may come before it, and nothing of it has to enter until then.
        """
        waits = self.shares_weights and self.feeding.flushes(num_stages)
        return self.num_filling(num_stages) + (not waits)
