"""Devices saved: the fewest nodes that do what is asked under each policy, and the highest rate of four."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from lemix.studies.demand import HELD_OUT_SEEDS
from lemix.studies.frontier_loads import FULL, QUICK, TBT_FACTOR, FrontierLoad, FrontierPlan
from lemix.studies.frontier_report import (
    FEWEST,
    HELD_OUT,
    IN_TIME_SHARE,
    NODES_ASKED,
    QUESTION,
    RATE,
    RATE_ASKED,
    TRAINING_NODES,
    report,
)
from lemix.studies.grid import Cell, PolicySearch, Search, Study
from lemix.studies.rows import BOUND, POLICY, Label, Metrics
from lemix.studies.runs import least_nodes, run_cell
from lemix.studies.searching import (
    KEPT_ENOUGH,
    all_of,
    fewest_nodes,
    fewest_of_both,
    highest_of_split,
    highest_rate,
)
from lemix.studies.setting import NODES
from lemix.studies.verdicts import LEMIX, SEPARATE, SLO
from lemix.studies.while_serving import UNDER_WAY

MIXED = (LEMIX, "least_loaded", "round_robin")
"""Policies whose nodes do both."""
ABOUT = f"""\
How many nodes does a load need? Every policy is tried on more and more nodes until the share of requests in
time is kept and at least {KEPT_ENOUGH:.0%} of the training was applied while requests arrived. (What came in
the last {UNDER_WAY:.0%} of that time is not counted: it is under way.)
Separate gets its best split: the fewest nodes that serve and the fewest that
train, each found for itself. `bound` is what nobody can undercut: stages always busy, the cheapest requests
and batches chosen, decoding left out. Where tokens are generated, the 99th percentile of the time between
tokens must also be within {TBT_FACTOR:g} times a round of one token through a node with nothing else to do.

A setting is enough when most of the seeds say so. Its runs stop when most agree; at the answer all are made.
Devices have 5 % noise and are off their profile by a table of their own; the bound is that of the profile.
Defaults of LeMix were chosen on seeds 0 to 3; seeds 4 and 5 are held out and stand apart in the tables."""


def frontier(*, quick: bool) -> Study:
    plan = QUICK if quick else FULL
    return Study(
        name="frontier",
        title="Devices saved",
        about=ABOUT,
        run=run_probe,
        searches=[search for load in plan.loads for search in _Frontier(plan, load).searches()],
        report=partial(report, plan=plan),
    )


def run_probe(cell: Cell) -> Metrics:
    """One run, its attainment also by itself where its seed is held out; of a bound, the number of nodes."""
    if cell.policy == BOUND:
        in_time = float(cell.extra[IN_TIME_SHARE])
        return {FEWEST: float(least_nodes(cell, in_time=in_time, kept=KEPT_ENOUGH))}
    metrics = run_cell(cell)
    return {**metrics, HELD_OUT: metrics[SLO] if cell.cluster.seed in HELD_OUT_SEEDS else None}


@dataclass(frozen=True, slots=True)
class _Frontier:
    """The searches for one load."""

    plan: FrontierPlan
    load: FrontierLoad

    def searches(self) -> Iterator[PolicySearch]:
        yield PolicySearch(BOUND, lambda: all_of(self.bounds()))
        for policy in MIXED:
            yield PolicySearch(policy, partial(self._fewest, policy))
        yield PolicySearch(SEPARATE, self._fewest_of_separate)
        for policy in MIXED if self.load.asks_rate else ():
            yield PolicySearch(policy, partial(self._highest, policy))
        if self.load.asks_rate:
            yield PolicySearch(SEPARATE, self._highest_of_separate)

    def _fewest(self, policy: str) -> Search:
        objectives = [self.load.demand().objective(share) for share in self.plan.shares]
        low = _lowest_bound(self)
        return fewest_nodes(objectives, partial(self._on_nodes, policy), low, self.plan.most_nodes)

    def _fewest_of_separate(self) -> Search:
        objectives = [self.load.demand().objective(share) for share in self.plan.shares]
        return fewest_of_both(
            objectives,
            lambda serving, training: self._on_nodes(SEPARATE, serving + training, training),
            1,
            self.plan.most_nodes,
        )

    def _highest(self, policy: str) -> Search:
        objective = self.load.demand().objective(self.plan.rate_share)
        return highest_rate(objective, partial(self._at_rate, policy), len(self.plan.rates))

    def _highest_of_separate(self) -> Search:
        objective = self.load.demand().objective(self.plan.rate_share)
        runs = partial(self._at_rate, SEPARATE)
        return highest_of_split(objective, runs, len(self.plan.rates), NODES)

    def bounds(self) -> list[Cell]:
        """For no policy: a run a seed and a share, the easiest share first."""
        return [
            replace(cell, extra={IN_TIME_SHARE: share})
            for share in self.plan.shares
            for cell in self.load.demand().runs(
                BOUND, 1, self.plan.seeds, {**self.load.labels, QUESTION: NODES_ASKED, IN_TIME_SHARE: share}
            )
        ]

    def _on_nodes(self, policy: str, nodes: int, training: int = 0) -> list[Cell]:
        labels = self._labels(NODES_ASKED, self.load.rate_per_s, policy, training)
        return self.load.demand().runs(_written(policy, nodes, training), nodes, self.plan.seeds, labels)

    def _at_rate(self, policy: str, step: int, training: int = 0) -> list[Cell]:
        rate_per_s = round(self.load.rate_per_s * self.plan.rates[step], 1)
        labels = self._labels(RATE_ASKED, rate_per_s, policy, training)
        demand = self.load.demand(rate_per_s)
        return demand.runs(_written(policy, NODES, training), NODES, self.plan.rate_seeds, labels)

    def _labels(self, question: str, rate_per_s: float, policy: str, training: int) -> dict[str, Label]:
        return {
            **self.load.labels,
            QUESTION: question,
            RATE: rate_per_s,
            TRAINING_NODES: training,
            POLICY: policy,
        }


@lru_cache
def _lowest_bound(of: _Frontier) -> int:
    """No policy gets by on fewer with any seed, so no search begins lower."""
    easiest = of.bounds()[: len(of.plan.seeds)]
    return min(least_nodes(cell, in_time=of.plan.shares[0], kept=KEPT_ENOUGH) for cell in easiest)


def _written(policy: str, nodes: int, training: int) -> str:
    """The policy as the scheduler reads it."""
    return f"{SEPARATE}:split={training / nodes}" if policy == SEPARATE else policy
