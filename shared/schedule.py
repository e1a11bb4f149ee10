"""The names of training's pipeline schedules, and of what they keep: what services and commands agree on."""

from dataclasses import dataclass
from sys import maxsize
from typing import Literal

ScheduleName = Literal["async", "1f1b", "gpipe", "dp"]
"""`async`: A-PP, no flush between batches. `1f1b`, `gpipe`: S-PP, a batch enters when the one before it is
in the weights. `dp`: nodes of one stage, whose gradients are averaged over the nodes at each step.
"""

StashingName = Literal["full", "double"]
"""Old weights that a stage keeps for microbatches in flight. `full`: as many versions as they need. `double`:
two, the newest and the one before; batches wait for room.
"""

MergeName = Literal["none", "average", "outer", "allreduce"]
"""How the weights of nodes become one: never; as their mean, or by DiLoCo's outer step towards it, every so
many batches; or step by step, by the mean of their gradients.
"""


def is_synchronous(schedule: ScheduleName) -> bool:
    """Whether a batch enters only when the one before it is in the weights."""
    return schedule != "async"


@dataclass(frozen=True, slots=True, kw_only=True)
class Feeding:
    """How the trainer feeds nodes, as far as one must know it to foresee what they will do."""

    schedule: ScheduleName = "async"

    def flushes(self, num_stages: int) -> bool:
        """Whether a batch enters only when the one before it is in the weights."""
        return is_synchronous(self.schedule) or num_stages == 1

    def max_in_flight(self, num_stages: int) -> int:
        """Microbatches between their entry and their last backward."""
        return maxsize if self.schedule == "gpipe" else num_stages


BY_DEFAULT = Feeding()
