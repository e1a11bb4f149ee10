"""The events of a demo, for the picture at its end. Times count from the beginning of the load."""

from dataclasses import dataclass, field

from lemix.load import Outcome


@dataclass(frozen=True, slots=True)
class LossPoint:
    """The loss of the served weights on held-out text, at one moment of the load."""

    at_s: float
    loss: float
    """Nats per token."""


@dataclass(slots=True)
class DemoRecord:
    """Collected while the demo runs."""

    losses: list[LossPoint] = field(default_factory=list)
    """In the order of time."""
    applied_at_s: list[float] = field(default_factory=list)
    """One entry for each training batch: when the weights contained it."""
    outcomes: list[Outcome] = field(default_factory=list)
    """One for each request."""
