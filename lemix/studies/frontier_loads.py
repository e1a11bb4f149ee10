"""Loads, training demands and objectives that the frontier asks of clusters, as an operator has them."""

from collections.abc import Sequence
from dataclasses import dataclass

from lemix.studies.demand import DEVICES, SEEDS, Demand, round_s
from lemix.studies.rows import Label
from lemix.studies.setting import CLASSES

TBT_FACTOR = 2.0
"""The objective for the time between tokens, in rounds of one token through a node that does nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierLoad:
    """One load, tried on nodes and at rates."""

    model: str
    """Class of model and devices."""
    rate_per_s: float
    training_tokens_per_s: float
    max_tokens: tuple[int, int] = (1, 1)
    num_requests: int = 400
    asks_rate: bool = False
    """Whether the highest rate on four nodes is looked for, too."""

    @property
    def labels(self) -> dict[str, Label]:
        low, high = self.max_tokens
        generated = f"; {low} to {high} tokens" if high > 1 else ""
        return {
            "load": f"{self.model}, {self.rate_per_s:g}/s{generated}; {self.training_tokens_per_s:g} trained"
        }

    def demand(self, rate_per_s: float | None = None) -> Demand:
        """At that rate (None: its own), with the load's training."""
        of = CLASSES[self.model]
        return Demand(
            profile=of.profile,
            rate_per_s=rate_per_s or self.rate_per_s,
            training_tokens_per_s=self.training_tokens_per_s,
            batch_size=of.batch_size,
            max_tokens=self.max_tokens,
            tbt_p99_s=TBT_FACTOR * round_s(of.profile) if self.max_tokens[1] > 1 else None,
            num_requests=self.num_requests,
            cluster=DEVICES,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPlan:
    """Everything that is searched, and how widely."""

    loads: Sequence[FrontierLoad]
    seeds: Sequence[int] = SEEDS[:3]
    rate_seeds: Sequence[int] = SEEDS[:3]
    most_nodes: int = 8
    shares: Sequence[float] = (0.95, 0.99)
    """Requests in time, the easier share first."""
    rate_share: float = 0.95
    rates: Sequence[float] = tuple(round(0.4 * 1.04**step, 3) for step in range(32))
    """As shares of a load's own, ascending."""


GENERATED = (64, 256)
FULL = FrontierPlan(
    loads=(
        FrontierLoad(model="gpt2-large", rate_per_s=1_400, training_tokens_per_s=11_960, num_requests=800),
        FrontierLoad(model="llama2-13b", rate_per_s=85, training_tokens_per_s=3_439, asks_rate=True),
        FrontierLoad(model="llama2-13b", rate_per_s=110, training_tokens_per_s=1_720, asks_rate=True),
        FrontierLoad(model="llama2-70b", rate_per_s=450, training_tokens_per_s=2_579, num_requests=1_600),
        FrontierLoad(
            model="gpt2-large",
            rate_per_s=100,
            training_tokens_per_s=11_960,
            max_tokens=(16, 64),
            num_requests=200,
        ),
        FrontierLoad(
            model="llama2-13b",
            rate_per_s=10,
            training_tokens_per_s=1_720,
            max_tokens=GENERATED,
            num_requests=100,
        ),
        FrontierLoad(
            model="llama2-70b",
            rate_per_s=20,
            training_tokens_per_s=1_290,
            max_tokens=GENERATED,
            num_requests=100,
        ),
    )
)
QUICK = FrontierPlan(
    loads=(FrontierLoad(model="gpt2-small", rate_per_s=400, training_tokens_per_s=20_000, num_requests=60),),
    seeds=SEEDS[:1],
    most_nodes=3,
    shares=(0.95,),
)
