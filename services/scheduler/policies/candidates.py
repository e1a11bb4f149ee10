"""The nodes worth a forecast: a few of any number, found by cheap facts."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest

from services.scheduler.cluster_node import ClusterNode
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
    there = [state.node(node) for node in nodes]
    busy = [each for each in there if each.tasks]
    idle_s = {each.node: _idle_s(each, now_s) for each in there if not each.tasks}
    found = [_candidate(each, 0.0, active_s=0.0) for each in nsmallest(MAX_BUSY, busy, key=_load)]
    if idle_s:
        active_s = linger_s if busy else min(idle_s.values())
        newest = _newest_of_each_kind(there, idle_s)
        found += [_candidate(each, idle_s[each.node], active_s=active_s) for each in newest]
    if holder is not None:
        found = [each for each in found if each.node != holder]
        found.append(_candidate(state.node(holder), idle_s.get(holder, 0.0), active_s=FOREVER))
    return sorted(found, key=lambda candidate: candidate.node)


def _load(there: ClusterNode) -> float:
    """The work there with one more task, where each takes as long as a short prompt."""
    return (len(there.tasks) + 1) * there.costs.slowness


def _newest_of_each_kind(there: Sequence[ClusterNode], idle_s: Mapping[int, float]) -> list[ClusterNode]:
    """The idle nodes that worked last, of each of the fastest kinds."""
    kinds: dict[Hashable, list[ClusterNode]] = {}
    for each in there:
        if each.node in idle_s:
            kinds.setdefault(each.costs.alike, []).append(each)
    fastest = nsmallest(MAX_KINDS, kinds.values(), key=lambda kind: kind[0].costs.slowness)
    return [each for kind in fastest for each in nsmallest(MAX_IDLE, kind, key=lambda one: idle_s[one.node])]


def _candidate(there: ClusterNode, idle_s: float, *, active_s: float) -> Candidate:
    return Candidate(there.node, there.node_model, there.costs, idle_s <= active_s, idle_s)


def _idle_s(there: ClusterNode, now_s: float) -> float:
    last_s = there.node_model.last_active_s
    return FOREVER if last_s is None else now_s - last_s
