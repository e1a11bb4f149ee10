"""The interface of placement policies, and the decisions that they may make."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.scheduler.forecast import Forecast
from services.scheduler.state import ClusterState
from shared.messages.inference import OWN_PACE, InferenceTask, Pace
from shared.messages.training import TrainingTask

TOO_MUCH_LOAD = 429
"""The code of a refusal: it cannot be served in time, or there is no room for it."""

Task = InferenceTask | TrainingTask


@dataclass(frozen=True, slots=True)
class Arrival:
    """A task that wants a node now."""

    task: Task
    arrived_s: float
    """When it first asked (scheduler's clock); a task that waits asks again."""


@dataclass(frozen=True, slots=True)
class Place:
    """Run the task on this node."""

    node: int
    forecast: Forecast | None = None
    """The forecast of the task on that node; None when the policy makes none."""
    cached_tokens: int = 0
    """Tokens at the beginning of a prompt that the node's KV cache holds."""
    beginnings: tuple[int, ...] = ()
    """The blocks of the prompt (see `prefix_memory`)."""
    pace: Pace = OWN_PACE
    """The room that a request leaves to others."""
    due_s: float | None = None
    """When a request's first token must be through the last stage; None: it is late already."""
    offload: bool = False
    """Training only: keep its saved activations in host memory, for want of room on the devices."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask again at `until_s`, or when the task's patience is over."""

    until_s: float
    reason: str
    in_line: bool = False
    """The task stands in the waiting line: it asks again only when its turn comes."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """The task gets no node; `code` is an HTTP status."""

    code: int
    reason: str
    retry_after_s: float | None = None
    """When asking again makes sense; None: nobody knows."""


Decision = Place | Wait | Refuse


class Policy(Protocol):
    """Decides where a task runs. Pure: it changes nothing but, for `random`, its own generator."""

    name: str

    def choose(self, state: ClusterState, arrival: Arrival, now_s: float) -> Decision: ...


def ready_nodes(state: ClusterState, limit: int | None) -> Sequence[int]:
    """The ready nodes, ascending; the first `limit` of them (the paper's "+" forms)."""
    return state.ready_nodes if limit is None else state.ready_nodes[:limit]


def no_node(state: ClusterState) -> Refuse:
    """The answer of every policy when no node can take a task."""
    return Refuse(503, f"no node is ready ({state.num_nodes} known)")
