"""Options of `lemix`: weights and bounds of its parts, and which parts are switched off."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from services.scheduler.policies.options import Options

Part = Literal["idleness", "consistency", "consolidation", "deferral", "memory", "profile"]
"""`profile`: costs are learned from what runs, as if nobody had measured the model before."""


def _parts(text: object) -> object:
    """Read `a+b`, as a policy's text has it."""
    return frozenset(text.split("+")) if isinstance(text, str) else text


CALM_LOAD, BUSY_LOAD = 0.25, 0.5
"""Shares of their time for which devices work: up to the first, nodes can be left idle at no risk; from the
second on, all are needed, and what counts is that no queue grows."""
CALM_COMFORT, BUSY_COMFORT = 0.6, 0.3
CALM_OPENING, BUSY_OPENING = 0.95, 0.5


def _between(calm: float, busy: float, load: float) -> float:
    """The value at a load: `calm` up to CALM_LOAD, `busy` from BUSY_LOAD on, on a line in between."""
    share = min(max((load - CALM_LOAD) / (BUSY_LOAD - CALM_LOAD), 0.0), 1.0)
    return calm + (busy - calm) * share


class LemixOptions(Options):
    """Times are shares or multiples of the response-time objective; docs/policy.md has the formulas."""

    without: Annotated[frozenset[Part], BeforeValidator(_parts)] = frozenset()
    score: Literal["corrected", "paper"] = "corrected"

    alpha: float = Field(default=0.15, gt=0)
    beta: float = Field(default=0.05, ge=0)
    epsilon: float = Field(default=0.2, gt=0)
    """Weights of the paper's score: lambda1, lambda2 and tau. `beta` also weighs ours."""
    idleness: float = Field(default=0.1, ge=0)
    """Weight of an objective's length of idle device time before a task (`corrected`)."""
    exposure: float = Field(default=1.0, ge=0)
    """Weight of the training that a request may meet unforeseen, against its response time."""
    comfort: float | None = Field(default=None, ge=0, le=1)
    """A request may take any node where it uses up to this share of the time that it has to spare. None: by
    the load (`comfort_at`)."""
    opening: float | None = Field(default=None, ge=0, le=1)
    """While an active node answers within this share of that time, no further node is opened. None: by the
    load (`opening_at`)."""
    stretch: float = Field(default=0.1, ge=0)
    """A batch may end by this share later than on the fastest node, so that fewer nodes are used."""
    linger: float = Field(default=4.0, ge=0)
    """A node without work stays active for so many objectives."""
    late_share: float = Field(default=0.01, ge=0)
    """Share of expected requests that training may make late without having to wait for it."""
    patience: float = Field(default=10.0, gt=0)
    """A batch that has waited for so many objectives runs whatever it makes late."""
    memory_patience_s: float = Field(default=7.0, ge=0)
    """How long a request waits for room in a KV cache; then it is refused. The scheduler holds none longer
    than 8 s."""
    offload_after: float = Field(default=0.005, ge=0)
    """A batch that has waited for room for its activations for so many objectives is offloaded."""

    def comfort_at(self, load: float) -> float:
        """`comfort` where devices work for that share of their time."""
        return _between(CALM_COMFORT, BUSY_COMFORT, load) if self.comfort is None else self.comfort

    def opening_at(self, load: float) -> float:
        """`opening` where devices work for that share of their time."""
        return _between(CALM_OPENING, BUSY_OPENING, load) if self.opening is None else self.opening

    def has(self, part: Part) -> bool:
        """Whether the part is switched on."""
        return part not in self.without
