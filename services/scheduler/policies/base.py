"""What a placement policy is."""

from typing import Protocol

from services.scheduler.state import ClusterState
from shared.messages.inference import InferenceTask
from shared.messages.training import TrainingTask

Task = InferenceTask | TrainingTask


class Policy(Protocol):
    """Chooses a node. Pure: the same state and task give the same node, and nothing changes."""

    name: str

    def choose(self, state: ClusterState, task: Task) -> int | None:
        """The id of one of `state.ready_nodes`; None when there is none."""
        ...
