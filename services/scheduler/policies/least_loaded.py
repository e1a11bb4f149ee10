"""Mix-LUF of the paper, with the tasks in flight as the load instead of device memory."""

from services.scheduler.policies.base import Arrival, Decision, Place, no_node, ready_nodes
from services.scheduler.policies.options import Options
from services.scheduler.state import ClusterState


class LeastLoaded:
    """The ready node with the fewest tasks placed and not ended; of equals, the lowest id."""

    name = "least_loaded"

    def __init__(self, options: Options) -> None:
        self._options = options

    def choose(self, state: ClusterState, arrival: Arrival, now_s: float) -> Decision:
        ready = ready_nodes(state, self._options.nodes)
        return Place(min(ready, key=lambda node: state.node(node).num_tasks)) if ready else no_node(state)
