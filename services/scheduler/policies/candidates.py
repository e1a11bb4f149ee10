"""The nodes worth a forecast: a few of any number, found by cheap facts."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest

from services.scheduler.node.node_model import NodeModel
from services.scheduler.state import ClusterState

MAX_BUSY = 8
"""Busy nodes looked at: those with the fewest tasks."""
MAX_IDLE = 2


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that may get the task."""

    node: int
    node_model: NodeModel
    is_active: bool
    """It works, or did a moment ago."""
    idle_s: float
    """Since it last had work; 0 while it has, infinite if it never had."""


def shortlist(
    state: ClusterState, nodes: Sequence[int], *, now_s: float, linger_s: float, holder: int | None = None
) -> list[Candidate]:
    """The least loaded busy nodes, and the idle nodes that worked last; ascending, at least one.

    Idle nodes differ in nothing else, so two stand for all: one for the task, one for the tasks after it.
    Where all are idle, the one that worked last goes on; else it stays active for `linger_s`.

    `holder`: the node whose KV cache holds most of a prompt; it is always one of them, and counts as active:
    its part of the prompt is work that nobody has to do.
    """
    busy = [node for node in nodes if state.num_tasks(node)]
    least_busy = nsmallest(MAX_BUSY, busy, key=state.num_tasks)
    if holder in busy and holder not in least_busy:
        least_busy.append(holder)
    found = [Candidate(node, state.node_model(node), True, 0.0) for node in least_busy]
    if len(busy) < len(nodes):
        idle_s = {node: _idle_s(state.node_model(node), now_s) for node in nodes if not state.num_tasks(node)}
        newest = nsmallest(MAX_IDLE, idle_s, key=idle_s.__getitem__)
        active_s = linger_s if busy else idle_s[newest[0]]
        if holder in idle_s and holder not in newest:
            newest.append(holder)
        found += [
            Candidate(node, state.node_model(node), idle_s[node] <= active_s or node == holder, idle_s[node])
            for node in newest
        ]
    return sorted(found, key=lambda candidate: candidate.node)


def _idle_s(node_model: NodeModel, now_s: float) -> float:
    return float("inf") if node_model.last_active_s is None else now_s - node_model.last_active_s
