"""NaiveMix of the paper: the nodes in turn, whatever the task."""

from bisect import bisect_right

from services.scheduler.policies.base import Task
from services.scheduler.state import ClusterState


class RoundRobin:
    """The ready node with the next higher id than the node chosen last, and again from the lowest."""

    name = "round_robin"

    def choose(self, state: ClusterState, task: Task) -> int | None:
        ready = state.ready_nodes
        if not ready:
            return None
        return ready[bisect_right(ready, state.last_node) % len(ready)]
