"""The losses by which a guard judges a weights version."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Mean losses of one version per learnt token, in nats; None where there are no such examples."""

    held_out: float | None = None
    """On the examples of a file, and those that the run holds out by itself."""
    num_held_out: int = 0
    """How many these are: losses on others cannot be compared."""
    samples: float | None = None
    """On what the model wrote itself before it learnt."""
    samples_rise: float = 0.0
    """How much more that is than it was for the weights that wrote it: an estimate of the Kullback-Leibler
    divergence of the version's distribution from theirs, per token.
    """

    @property
    def are_known(self) -> bool:
        """Whether there were examples to judge the version on."""
        return self.held_out is not None or self.samples is not None

    def __str__(self) -> str:
        named = (("held-out loss", self.held_out), ("loss on own samples", self.samples))
        return ", ".join(f"{name} {loss:.4f}" for name, loss in named if loss is not None) or "not measured"
