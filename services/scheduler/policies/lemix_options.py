"""Options of `lemix`: weights and bounds of its parts, and which parts are switched off."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from services.scheduler.policies.options import Options

Part = Literal["idleness", "consistency", "consolidation", "deferral", "memory", "profile"]
"""`profile`: costs are learned from what runs, as if nobody had measured the model before."""


def _parts(text: object) -> object:
    """Read `a+b`, as a policy's text has it."""
    return frozenset(text.split("+")) if isinstance(text, str) else text


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
    comfort: float = Field(default=0.6, ge=0, le=1)
    """A request may take any node where it uses up to this share of the time that it has to spare."""
    opening: float = Field(default=0.95, ge=0, le=1)
    """While an active node answers within this share of that time, no further node is opened."""
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

    def has(self, part: Part) -> bool:
        """Whether the part is switched on."""
        return part not in self.without
