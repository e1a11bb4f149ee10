"""Steps that all nodes make together, on the mean of their gradients: `allreduce`, and data-parallel. Pure.

    train --each has gradients, or no batch--> reduce --all have the mean--> step --all have stepped--> ...

All nodes always hold the same weights. A node that joins gets them from a checkpoint, for which the others
wait; when one leaves in the middle of a step, all go back to the newest checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from services.trainer.nodes.node_training import NodeTraining
from services.trainer.nodes.placed_batches import PlacedBatches
from services.trainer.sharing.decisions import (
    Decision,
    Member,
    Nodes,
    Reduce,
    Shared,
    admit,
    durable_version,
    give_up,
    is_rollback_under_way,
    may_save,
    node_actions,
    open_nodes,
)


@dataclass(slots=True)
class _Round:
    """One step that is under way."""

    members: tuple[int, ...]
    version: int
    """The version of the weights after it: each batch counts."""
    rate_of: tuple[str, ...]
    """The batches of all, whose gradients and learning rates have the same share in the means."""
    phase: Literal["reducing", "stepping"] = "reducing"


class Reductions:
    """Looks at the nodes after everything that happens."""

    def __init__(self, *, save_every: int, idle_s: float, new_name: Callable[[], str]) -> None:
        """`save_every`: batches between two checkpoints; without work for `idle_s` there is one, too."""
        self._save_every = save_every
        self._idle_s = idle_s
        self._new_name = new_name
        self._round: _Round | None = None
        self._idle_since_s: float | None = None

    def decide(self, nodes: Nodes, now_s: float) -> list[Decision]:
        """Decide on the next things to do; to be asked again until there are none."""
        if is_rollback_under_way(nodes):
            self._round = self._idle_since_s = None
            return []
        members = open_nodes(nodes)
        if self._round is not None:
            return self._go_on(self._round, nodes, now_s)
        self._share_checkpoints(members, nodes)
        is_wanted = any(node.work.steps.wants_save for node in members)
        if is_wanted and may_save(members[0], now_s, is_awaited=True):
            # Before a step leads away from that version.
            return [node_actions(members[0], members[0].work.save(now_s))]
        if any(node.life.waits_to_join or node.life.phase == "restoring" for node in nodes.values()):
            return self._admit_newcomers(members, nodes, now_s)
        paused = [node for node in members if node.work.gate.is_paused]
        released: list[Decision] = [node_actions(node, node.work.resume(now_s)) for node in paused]
        return released or self._save_if_due(members, now_s) or self._begin_if_ready(members, now_s)

    def _go_on(self, now: _Round, nodes: Nodes, now_s: float) -> list[Decision]:
        members = [nodes[number] for number in now.members]
        if gone := [node.node for node in members if node.life.phase != "open"]:
            self._round = None
            return give_up(members, f"node {gone[0]} left during a step of all")
        if now.phase == "reducing" and all(_placed(node).has_joint_gradients for node in members):
            now.phase = "stepping"
            return self._order_steps(now, members, now_s)
        if now.phase == "stepping" and not any(_placed(node).has_joint_step for node in members):
            self._round = None
            return [Shared(now.members)]
        return []

    def _order_steps(self, now: _Round, members: list[NodeTraining], now_s: float) -> list[Decision]:
        """Order all nodes alike: their norms for the same gradients may differ in the last bit."""
        squared_norm, is_saved = _placed(members[0]).squared_norm, may_save(members[0], now_s)
        assert squared_norm is not None
        return [
            node_actions(
                node,
                node.work.steps.order(
                    now.version, now_s, rate_of=now.rate_of, squared_norm=squared_norm, may_save=is_saved
                ),
            )
            for node in members
        ]

    def _share_checkpoints(self, members: list[NodeTraining], nodes: Nodes) -> None:
        version = durable_version(nodes)
        for node in members:
            node.work.saves.adopt(version)

    def _admit_newcomers(self, members: list[NodeTraining], nodes: Nodes, now_s: float) -> list[Decision]:
        """Let newcomers join; the others wait with nothing under way until those hold the same weights."""
        for node in members:
            node.work.pause()
        if not all(node.work.is_quiet for node in members):
            # Who is restored holds the newest checkpoint: it must step with those who begin to step from it.
            is_awaited = any(node.life.phase == "restoring" for node in nodes.values())
            return [] if is_awaited else self._begin_if_ready(members, now_s)
        if members and members[0].version != durable_version(nodes):
            leader = members[0]
            return (
                [node_actions(leader, leader.work.save(now_s))]
                if may_save(leader, now_s, is_awaited=True)
                else []
            )
        return admit(nodes)

    def _save_if_due(self, members: list[NodeTraining], now_s: float) -> list[Decision]:
        if not members:
            return []
        leader = members[0]
        num_undurable = leader.version - leader.durable_version
        if not (num_undurable and all(node.work.is_idle for node in members)):
            self._idle_since_s = None
        elif self._idle_since_s is None:
            self._idle_since_s = now_s
        is_idle = self._idle_since_s is not None and now_s - self._idle_since_s >= self._idle_s
        if (num_undurable >= self._save_every or is_idle) and may_save(leader, now_s):
            self._idle_since_s = None
            return [node_actions(leader, leader.work.save(now_s))]
        return []

    def _begin_if_ready(self, members: list[NodeTraining], now_s: float) -> list[Decision]:
        """Begin when each node has gradients or nothing to compute them from, and at least one has some."""
        assert len({node.version for node in members}) <= 1, "nodes that step together hold the same weights"
        for node in members:
            squared_norm = _placed(node).squared_norm
            if squared_norm is not None and not isfinite(squared_norm):
                return [node_actions(node, node.work.steps.skip(now_s))]
        ready = [node for node in members if _placed(node).complete is not None]
        others_rest = all(node in ready or node.work.steps.has_nothing_begun for node in members)
        if not ready or not others_rest or any(node.work.saves.is_unanswered for node in members):
            return []
        name = self._new_name()
        taking_part = tuple(
            Member(
                node.node,
                node.life.fence,
                node.life.members.num_stages,
                1 / len(ready) if node in ready else 0.0,
                node.work.steps.join(name),
            )
            for node in members
        )
        version = members[0].version + len(ready)
        rate_of = tuple(member.batch_id for member in taking_part if member.batch_id)
        self._round = _Round(tuple(node.node for node in members), version, rate_of)
        return [Reduce(name, taking_part)]


def _placed(node: NodeTraining) -> PlacedBatches:
    return node.work.steps.placed
