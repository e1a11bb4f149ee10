"""Mix-LUF of the paper, with the tasks in flight as the load instead of device memory."""

from services.scheduler.policies.base import Task
from services.scheduler.state import ClusterState


class LeastLoaded:
    """The ready node with the fewest tasks placed and not ended; of equals, the lowest id."""

    name = "least_loaded"

    def choose(self, state: ClusterState, task: Task) -> int | None:
        return min(state.ready_nodes, key=state.num_tasks, default=None)
