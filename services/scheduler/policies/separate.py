"""Separate of the paper: some nodes train, the others serve."""

from typing import Annotated, Literal

from pydantic import Field

from services.scheduler.policies.base import Arrival, Decision, Place, no_node, ready_nodes
from services.scheduler.policies.options import Options
from services.scheduler.policies.round_robin import next_in_turn
from services.scheduler.state import ClusterState
from shared.messages.training import TrainingTask

BUSY_PER_S = 15.0
"""`split=dynamic`: above this rate of requests, half of the nodes serve; else a quarter."""


class SeparateOptions(Options):
    """Options of `separate`."""

    split: Literal["dynamic"] | Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the nodes that train; `dynamic`: follows the rate of requests."""


class Separate:
    """The first nodes serve, the rest train; round robin within each. A single node does both."""

    name = "separate"

    def __init__(self, options: SeparateOptions) -> None:
        self._options = options

    def choose(self, state: ClusterState, arrival: Arrival, now_s: float) -> Decision:
        ready = ready_nodes(state, self._options.nodes)
        if not ready:
            return no_node(state)
        num_serving = self._num_serving(len(ready), state, now_s)
        if isinstance(arrival.task, TrainingTask):
            return Place(next_in_turn(ready[num_serving:] or ready, state.last_node_of["training"]))
        return Place(next_in_turn(ready[:num_serving], state.last_node_of["inference"]))

    def _num_serving(self, num_nodes: int, state: ClusterState, now_s: float) -> int:
        if self._options.split != "dynamic":
            num_training = max(1, round(num_nodes * self._options.split))
            return max(1, num_nodes - num_training)
        is_busy = state.demand.inference_rate.per_s(now_s) > BUSY_PER_S
        return max(1, num_nodes // (2 if is_busy else 4))
