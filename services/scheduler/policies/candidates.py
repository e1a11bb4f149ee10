"""The nodes worth a forecast: a few of any number, found by cheap facts."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import nsmallest

from services.scheduler.node.node_model import NodeModel
from services.scheduler.node_costs import NodeCosts
from services.scheduler.state import ClusterState

MAX_BUSY = 8
"""Busy nodes looked at: those with the least work, counted in tasks and weighed by the time of one."""
MAX_IDLE = 2
"""Idle nodes of each kind."""
MAX_KINDS = 4
"""Kinds of idle nodes, the fastest."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that may get the task."""

    node: int
    node_model: NodeModel
    costs: NodeCosts
    is_active: bool
    """It works, or did a moment ago."""
    idle_s: float
    """Since it last had work; 0 while it has, infinite if it never had."""


def shortlist(
    state: ClusterState, nodes: Sequence[int], *, now_s: float, linger_s: float, holder: int | None = None
) -> list[Candidate]:
    """The least loaded busy nodes, and the idle nodes that worked last; ascending, at least one.

    Idle nodes of equal costs differ in nothing else, so two stand for all: one for the task, one for the
    tasks after it. Where all are idle, the one that worked last goes on; else it stays active for `linger_s`.

    `holder`: the node whose KV cache holds most of a prompt; it is always one of them, and counts as active:
    its part of the prompt is work that nobody has to do.
    """
    busy = [node for node in nodes if state.num_tasks(node)]
    least_busy = nsmallest(MAX_BUSY, busy, key=partial(_load, state))
    if holder in busy and holder not in least_busy:
        least_busy.append(holder)
    found = [Candidate(node, state.node_model(node), state.costs_of(node), True, 0.0) for node in least_busy]
    if len(busy) < len(nodes):
        idle_s = {node: _idle_s(state.node_model(node), now_s) for node in nodes if not state.num_tasks(node)}
        newest = _newest_of_each_kind(state, idle_s)
        active_s = linger_s if busy else min(idle_s.values())
        if holder in idle_s and holder not in newest:
            newest.append(holder)
        found += [
            Candidate(
                node,
                state.node_model(node),
                state.costs_of(node),
                idle_s[node] <= active_s or node == holder,
                idle_s[node],
            )
            for node in newest
        ]
    return sorted(found, key=lambda candidate: candidate.node)


def _load(state: ClusterState, node: int) -> float:
    """The work there with one more task, where each takes as long as a short prompt."""
    return (state.num_tasks(node) + 1) * state.costs_of(node).slowness


def _newest_of_each_kind(state: ClusterState, idle_s: Mapping[int, float]) -> list[int]:
    """The idle nodes that worked last, of each of the fastest kinds."""
    kinds: dict[Hashable, list[int]] = {}
    for node in idle_s:
        kinds.setdefault(state.costs_of(node).alike, []).append(node)
    fastest = nsmallest(MAX_KINDS, kinds.values(), key=lambda kind: state.costs_of(kind[0]).slowness)
    return [node for kind in fastest for node in nsmallest(MAX_IDLE, kind, key=idle_s.__getitem__)]


def _idle_s(node_model: NodeModel, now_s: float) -> float:
    return float("inf") if node_model.last_active_s is None else now_s - node_model.last_active_s
