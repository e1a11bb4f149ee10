"""LeMix as its authors released it: the score of `released_score`, and its parking of batches."""

from collections.abc import Sequence
from statistics import fmean

from pydantic import Field

from services.scheduler.costs import Costs
from services.scheduler.node.node_model import NodeModel
from services.scheduler.policies.base import Arrival, Decision, Place, Wait, no_node, ready_nodes
from services.scheduler.policies.options import Options
from services.scheduler.policies.released_score import NodeTrace, Scored, Trained, Weights, score
from services.scheduler.state import ClusterState
from services.scheduler.tasks import TaskShape, shape_of
from shared.messages.training import TrainingTask
from shared.profiles.times import Work, work_of_rows


class ReleasedOptions(Options):
    """Options of `lemix_released`."""

    alpha: float = Field(default=0.15, gt=0)
    beta: float = Field(default=0.05, ge=0)
    epsilon: float = Field(default=0.2, gt=0)
    park: bool = True
    """A batch whose forward would end later than the objective waits until it would not."""


class LemixReleased:
    """The node with the greatest score; of equals, the lowest id. Exact where the costs are `quadratic`."""

    name = "lemix_released"

    def __init__(self, options: ReleasedOptions) -> None:
        self._options = options
        self._weights = Weights(alpha=options.alpha, beta=options.beta, epsilon=options.epsilon)

    def choose(self, state: ClusterState, arrival: Arrival, now_s: float) -> Decision:
        nodes = ready_nodes(state, self._options.nodes)
        if not nodes:
            return no_node(state)
        shape = shape_of(arrival.task)
        scored = {node: self._score(state, node, shape, now_s) for node in nodes}
        best = max(nodes, key=lambda node: scored[node].score)
        late_s = scored[best].response_s - state.slo_s
        if self._options.park and isinstance(arrival.task, TrainingTask) and late_s > 0:
            return Wait(now_s + late_s, "its own forward would end later than the objective")
        return Place(best, scored[best].forecast)

    def _score(self, state: ClusterState, node: int, shape: TaskShape, now_s: float) -> Scored:
        node_model, costs = state.node(node).node_model, state.costs
        return score(
            trace_of(node_model, costs),
            self._weights,
            release_s=now_s,
            length=shape.num_tokens,
            forward_s=forward_s(costs, node_model.num_stages, _works(shape)),
            backward_s=backward_s(costs, node_model.num_stages, shape.microbatches),
        )


def trace_of(node_model: NodeModel, costs: Costs) -> NodeTrace:
    """The facts about a node that the formula needs."""
    last = node_model.last_assigned
    return NodeTrace(
        num_stages=node_model.num_stages,
        last_release_s=node_model.last_arrival_s,
        last_forward_end_s=[interval.end_s for interval in last.forward] if last else [],
        training=[
            Trained(task.backward, backward_s(costs, node_model.num_stages, task.shape.microbatches))
            for task in node_model.assigned()
            if task.kind == "training" and task.backward
        ],
        length_mean=node_model.lengths.mean,
        length_std=node_model.lengths.std,
    )


def forward_s(costs: Costs, num_stages: int, works: Sequence[Work]) -> float:
    """eta_f * b * L^2; with costs that differ between stages, their mean."""
    return fmean(sum(costs.iteration_s(stage, work) for work in works) for stage in range(num_stages))


def backward_s(costs: Costs, num_stages: int, works: Sequence[Work]) -> float:
    """eta_b * b * L^2, in the same way; 0 for no work."""
    return fmean(sum(_backward_s(costs, stage, work) for work in works) for stage in range(num_stages))


def _backward_s(costs: Costs, stage: int, work: Work) -> float:
    """Backward times; the last stage's is in its forward."""
    return costs.backward_s(stage, work) or costs.forward_s(stage, work) - costs.iteration_s(stage, work)


def _works(shape: TaskShape) -> Sequence[Work]:
    return shape.microbatches or (work_of_rows(0, shape.prompt_tokens),)
