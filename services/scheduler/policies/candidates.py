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
FOREVER = float("inf")


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
    busy = [node for node in nodes if state.node(node).num_tasks]
    least_busy = nsmallest(MAX_BUSY, busy, key=partial(_load, state))
    if holder in busy and holder not in least_busy:
        least_busy.append(holder)
    found = [_candidate(state, node, 0.0, active_s=0.0) for node in least_busy]
    if len(busy) < len(nodes):
        idle_s = {node: _idle_s(state, node, now_s) for node in nodes if not state.node(node).num_tasks}
        newest = _newest_of_each_kind(state, idle_s)
        active_s = linger_s if busy else min(idle_s.values())
        found += [_candidate(state, node, idle_s[node], active_s=active_s) for node in newest]
        if holder in idle_s:
            found = [each for each in found if each.node != holder]
            found.append(_candidate(state, holder, idle_s[holder], active_s=FOREVER))
    return sorted(found, key=lambda candidate: candidate.node)


def _load(state: ClusterState, node: int) -> float:
    """The work there with one more task, where each takes as long as a short prompt."""
    return (state.node(node).num_tasks + 1) * state.node(node).costs.slowness


def _newest_of_each_kind(state: ClusterState, idle_s: Mapping[int, float]) -> list[int]:
    """The idle nodes that worked last, of each of the fastest kinds."""
    kinds: dict[Hashable, list[int]] = {}
    for node in idle_s:
        kinds.setdefault(state.node(node).costs.alike, []).append(node)
    fastest = nsmallest(MAX_KINDS, kinds.values(), key=lambda kind: state.node(kind[0]).costs.slowness)
    return [node for kind in fastest for node in nsmallest(MAX_IDLE, kind, key=idle_s.__getitem__)]


def _candidate(state: ClusterState, node: int, idle_s: float, *, active_s: float) -> Candidate:
    known = state.node(node)
    return Candidate(node, known.node_model, known.costs, idle_s <= active_s, idle_s)


def _idle_s(state: ClusterState, node: int, now_s: float) -> float:
    last_s = state.node(node).node_model.last_active_s
    return FOREVER if last_s is None else now_s - last_s
