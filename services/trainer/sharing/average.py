"""When the weights of nodes that train apart become one again: `average` and `outer`. Pure.

    train apart --enough batches, or idle--> hold --all quiet--> merge --all hold the mean--> save --> ...

A version that cannot be saved is kept, with training at rest, and saved again after a while. A member that
leaves takes all back to the last checkpoint, and so does a merge that fails; the next one waits longer each
time. A rollback, too, takes all out of a merge.

Between two merges all nodes descend from the same checkpoint: that of the last merge, which one of them has
written. So a node may join, or come back, at any other time, and a checkpoint of one node is one of all.
Training rests during a merge, so that what a version contains is clear; serving goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Literal

from services.trainer.nodes.node_training import NodeTraining
from services.trainer.sharing.decisions import (
    Decision,
    Member,
    Merge,
    Nodes,
    Shared,
    admit,
    give_up,
    is_rollback_under_way,
    may_save,
    node_actions,
    open_nodes,
)

MAX_FAILURES = 3
"""After so many merges in a row that failed, their members train no more."""


@dataclass(slots=True)
class _Round:
    """One merge on its way."""

    name: str
    members: tuple[int, ...]
    phase: Literal["pausing", "merging", "saving"] = "pausing"
    version: int = 0


class Merges:
    """Looks at the nodes after everything that happens."""

    def __init__(self, *, every: int, idle_s: float, new_name: Callable[[], str]) -> None:
        """`every`: batches of each node, on average, between two merges. After `idle_s` without work there is
        one, too. After one that fails, the next waits for `idle_s`, and twice as long after each more.
        """
        self._every = every
        self._idle_s = idle_s
        self._new_name = new_name
        self._round: _Round | None = None
        self._idle_since_s: float | None = None
        self._num_failures = 0
        """Since a merge succeeded, or a rollback."""
        self._not_before_s = -inf

    def decide(self, nodes: Nodes, now_s: float) -> list[Decision]:
        """Decide on the next things to do; to be asked again until there are none."""
        if is_rollback_under_way(nodes):
            return self._begin_anew()
        if self._round is None:
            return admit(nodes) or self._begin_if_due(nodes, now_s)
        members = [nodes[number] for number in self._round.members]
        if gone := [node.node for node in members if node.life.phase != "open"]:
            return self._fail(members, f"node {gone[0]} left during a merge", now_s)
        match self._round.phase:
            case "pausing" if all(node.work.is_quiet for node in members):
                return self._merge(members, self._round)
            case "saving" if not members[0].work.saves.is_saving:
                return self._saved(members, self._round, now_s)
        return []

    def merged(self, name: str, failure: str, nodes: Nodes, now_s: float) -> list[Decision]:
        """The stages hold the mean, or do not (`failure` says why)."""
        if self._round is None or self._round.name != name:
            return []
        members = [nodes[number] for number in self._round.members]
        if failure or any(node.life.phase != "open" for node in members):
            return self._fail(members, f"a merge failed: {failure or 'a node left'}", now_s)
        self._num_failures = 0
        self._round.phase = "saving"
        published = [node_actions(node, node.work.merge.finish(self._round.version)) for node in members]
        return [
            Shared(self._round.members),
            *published,
            node_actions(members[0], members[0].work.save(now_s)),
        ]

    def _begin_if_due(self, nodes: Nodes, now_s: float) -> list[Decision]:
        members = open_nodes(nodes)
        is_due = bool(members) and _num_apart(members) >= self._every * len(members)
        is_due = is_due and members[0].work.saves.schedule.is_within_bound(now_s)
        if is_due:
            _pause(members)  # whatever the merge must wait for, nodes drift no further apart
        elif paused := [node for node in members if node.work.gate.is_paused]:  # then one more has come
            return [node_actions(node, node.work.resume(now_s)) for node in paused]
        if now_s < self._not_before_s:
            return []
        if any(node.life.phase == "restoring" for node in nodes.values()):
            return []  # it would come to the others with the weights from before their merge
        if not (self._has_rested(members, now_s) or is_due):
            return []
        self._idle_since_s = None
        self._round = _Round(self._new_name(), tuple(node.node for node in members))
        _pause(members)
        return self.decide(nodes, now_s)

    def _has_rested(self, members: list[NodeTraining], now_s: float) -> bool:
        """Whether there has been something to merge, and no work, for long enough."""
        if not (_num_apart(members) and all(node.work.is_idle for node in members)):
            self._idle_since_s = None
            return False
        if self._idle_since_s is None:
            self._idle_since_s = now_s
        return now_s - self._idle_since_s >= self._idle_s and may_save(members[0], now_s)

    def _merge(self, members: list[NodeTraining], now: _Round) -> list[Decision]:
        base, num_apart = members[0].durable_version, _num_apart(members)
        now.phase, now.version = "merging", base + num_apart
        taking_part = tuple(
            Member(
                node.node,
                node.life.fence,
                node.life.members.num_stages,
                (node.version - base) / num_apart,
                is_kept=node.work.merge.begin(now.version),
            )
            for node in members
        )
        return [Merge(now.name, now.version, taking_part)]

    def _saved(self, members: list[NodeTraining], now: _Round, now_s: float) -> list[Decision]:
        leader, *others = members
        if leader.durable_version != now.version:
            return (
                [node_actions(leader, leader.work.save(now_s))]
                if may_save(leader, now_s, is_awaited=True)
                else []
            )
        for node in others:
            node.work.saves.adopt(now.version)
        return self._end([node_actions(node, node.work.resume(now_s)) for node in members])

    def _fail(self, members: list[NodeTraining], reason: str, now_s: float) -> list[Decision]:
        self._not_before_s = now_s + self._idle_s * 2**self._num_failures
        self._num_failures += 1
        decisions = give_up(members, reason)
        if self._num_failures >= MAX_FAILURES:
            halt = f"{self._num_failures} merges in a row failed; {reason}"
            decisions += [node_actions(node, node.halt(halt)) for node in members]
        return self._end(decisions)

    def _begin_anew(self) -> list[Decision]:
        """After a rollback, merges that failed before it say nothing about those to come."""
        self._num_failures, self._not_before_s, self._idle_since_s = 0, -inf, None
        return self._end([])

    def _end(self, decisions: list[Decision]) -> list[Decision]:
        self._round = None
        return decisions


def _num_apart(members: list[NodeTraining]) -> int:
    """Batches that single nodes contain, and not all."""
    return sum(node.version - node.durable_version for node in members)


def _pause(members: list[NodeTraining]) -> None:
    for node in members:
        node.work.pause()
