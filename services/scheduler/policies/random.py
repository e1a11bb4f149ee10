"""Mix-Random of the paper: any node, whatever the task."""

from collections.abc import Callable

from services.scheduler.policies.base import Arrival, Decision, Place, no_node, ready_nodes
from services.scheduler.policies.options import Options
from services.scheduler.state import ClusterState


class RandomNode:
    """Every ready node with the same probability."""

    name = "random"

    def __init__(self, options: Options, rng: Callable[[], float]) -> None:
        """`rng`: uniform in [0, 1)."""
        self._options = options
        self._rng = rng

    def choose(self, state: ClusterState, arrival: Arrival, now_s: float) -> Decision:
        ready = ready_nodes(state, self._options.nodes)
        return Place(ready[int(self._rng() * len(ready))]) if ready else no_node(state)
