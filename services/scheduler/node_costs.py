"""The costs of one node among others that may be faster or slower. Pure.

The nodes of one profile share its costs, and learn them together. Each stage of a node has a pace beside
them, which its own ops tell.
"""

from collections.abc import Hashable, Sequence
from math import log
from statistics import median

from services.scheduler.costs import CORRECTION_LIMITS, Costs
from shared.messages.events import OpKind
from shared.profiles.times import Work, work_of_rows

PACE_WEIGHT = 0.1
"""Weight of the newest op. It is less than that of shared costs: what slows all nodes down is in those."""
ALIKE = 1.25
"""Nodes within this factor of the shared costs are taken for alike: between ops of different sizes there are
such differences, too, and a decision looks at all nodes that are alike at once."""
PACE_STEP = 1.05
"""Paces of other nodes are powers of it, so that those can be alike, too."""
PACE_SLACK = 1.1
"""A pace stays until the learnt one differs from it by this factor."""
COMPARED = work_of_rows(0, 128)
"""The work by whose time nodes of different profiles are compared."""


class NodeCosts:
    """Implements `Costs`: shared ones, times the pace of each stage."""

    def __init__(self, shared: Costs, num_stages: int, others: Sequence["NodeCosts"] = ()) -> None:
        """`others`: nodes with the same shared costs; without any history the node is as most of them are."""
        self.hop_s = shared.hop_s
        self._shared = shared
        self._max_iteration_tokens = shared.max_iteration_tokens
        self._learnt: list[float] = [
            median([other._learnt[stage] for other in others] or [1.0]) for stage in range(num_stages)
        ]
        """By stage: the time of recent ops over that of the shared costs."""
        self._paces = [_pace(learnt, 1.0) for learnt in self._learnt]
        """By stage, as decisions see them."""
        self._describe()

    def shares(self, costs: Costs) -> bool:
        """Whether these are the costs that it shares with others."""
        return self._shared is costs

    @property
    def alike(self) -> Hashable:
        """The same for nodes whose costs are equal."""
        return self._alike

    @property
    def slowness(self) -> float:
        """Seconds of a short prompt: for comparison with other nodes."""
        return self._slowness

    @property
    def num_stages(self) -> int | None:
        return self._shared.num_stages

    @num_stages.setter
    def num_stages(self, value: int | None) -> None:
        self._shared.num_stages = value

    @property
    def max_iteration_tokens(self) -> int:
        return self._max_iteration_tokens

    @max_iteration_tokens.setter
    def max_iteration_tokens(self, value: int) -> None:
        if value != self._max_iteration_tokens:
            self._max_iteration_tokens = value
            self._describe()

    def iteration_s(self, stage: int, work: Work) -> float:
        return self._paces[stage] * self._shared.iteration_s(stage, work)

    def forward_s(self, stage: int, work: Work) -> float:
        return self._paces[stage] * self._shared.forward_s(stage, work)

    def backward_s(self, stage: int, work: Work) -> float:
        return self._paces[stage] * self._shared.backward_s(stage, work)

    def step_s(self, stage: int) -> float:
        return self._paces[stage] * self._shared.step_s(stage)

    def is_settled(self, stage: int, kind: OpKind) -> bool:
        return self._shared.is_settled(stage, kind)

    def observe(self, stage: int, kind: OpKind, work: Work, elapsed_s: float) -> None:
        if self._shared.is_settled(stage, kind):
            self._keep_pace(stage, elapsed_s, self._shared_s(stage, kind, work))
        self._shared.observe(stage, kind, work, elapsed_s / self._paces[stage])

    def _shared_s(self, stage: int, kind: OpKind, work: Work) -> float:
        shared = self._shared
        match kind:
            case "iteration":
                return shared.iteration_s(stage, work)
            case "forward":
                return shared.forward_s(stage, work)
            case "backward":
                return shared.backward_s(stage, work)
            case "step":
                return shared.step_s(stage)

    def _keep_pace(self, stage: int, elapsed_s: float, shared_s: float) -> None:
        if shared_s <= 0 or elapsed_s <= 0:
            return
        lowest, highest = CORRECTION_LIMITS
        surprise = min(max(elapsed_s / (self._learnt[stage] * shared_s), lowest), highest)
        learnt = self._learnt[stage] * (1 + PACE_WEIGHT * (surprise - 1))
        self._learnt[stage] = learnt
        pace = _pace(learnt, self._paces[stage])
        if pace != self._paces[stage]:
            self._paces[stage] = pace
            self._describe()

    def _describe(self) -> None:
        self._alike = (self._shared, self._max_iteration_tokens, *self._paces)
        self._slowness = sum(
            pace * self._shared.iteration_s(stage, COMPARED) for stage, pace in enumerate(self._paces)
        )


def _pace(learnt: float, before: float) -> float:
    """The pace that decisions see."""
    if 1 / ALIKE < learnt < ALIKE:
        return 1.0
    if 1 / PACE_SLACK < learnt / before < PACE_SLACK:
        return before
    return float(PACE_STEP ** round(log(learnt, PACE_STEP)))
