"""NaiveMix of the paper: the nodes in turn, whatever the task."""

from bisect import bisect_right
from collections.abc import Sequence

from services.scheduler.policies.base import Arrival, Decision, Place, no_node, ready_nodes
from services.scheduler.policies.options import Options
from services.scheduler.state import ClusterState


class RoundRobin:
    """The ready node with the next higher id than the node chosen last, and again from the lowest."""

    name = "round_robin"

    def __init__(self, options: Options) -> None:
        self._options = options

    def choose(self, state: ClusterState, arrival: Arrival, now_s: float) -> Decision:
        ready = ready_nodes(state, self._options.nodes)
        return Place(next_in_turn(ready, state.last_node)) if ready else no_node(state)


def next_in_turn(nodes: Sequence[int], last: int) -> int:
    """The node after `last` in `nodes` (ascending, not empty), and again from the lowest."""
    return nodes[bisect_right(nodes, last) % len(nodes)]
