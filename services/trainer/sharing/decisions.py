"""Decisions for several nodes together, and the state of a node that they look at."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.trainer.nodes.decisions import Action
from services.trainer.nodes.node_training import NodeTraining


@dataclass(frozen=True, slots=True)
class Member:
    """A node that takes part."""

    node: int
    fence: int
    num_stages: int
    share: float
    """The node's share of the mean."""
    batch_id: str = ""
    """Whose gradients it brings; empty: none, or weights."""
    is_kept: bool = False
    """Its stages keep the merged version, to serve it."""


@dataclass(frozen=True, slots=True)
class Merge:
    """Have every stage of every member hold the mean of their weights; answer with `merged`."""

    name: str
    version: int
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Reduce:
    """Have every stage of every member average its gradients; nodes then hear of them as their own."""

    name: str
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Shared:
    """The weights of these nodes are now the same, and contain all batches of each of them."""

    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Joins:
    """The node will hold the newest checkpoint of any node."""

    node: int


@dataclass(frozen=True, slots=True)
class NodeActions:
    """The actions that a node has decided on after an event."""

    node: int
    actions: tuple[Action, ...]


Decision = Merge | Reduce | Shared | Joins | NodeActions
Nodes = Mapping[int, NodeTraining]


def node_actions(node: NodeTraining, actions: Iterable[Action]) -> NodeActions:
    return NodeActions(node.node, tuple(actions))


def open_nodes(nodes: Nodes) -> list[NodeTraining]:
    """Nodes that hold weights and train, lowest first."""
    return [nodes[number] for number in sorted(nodes) if nodes[number].life.phase == "open"]


def durable_version(nodes: Nodes) -> int:
    """The version of the newest checkpoint of any node: each goes back to it."""
    return max((node.durable_version for node in nodes.values()), default=0)


def admit(nodes: Nodes) -> list[Decision]:
    """Let waiting nodes take the newest checkpoint, but not before it is known which one that is."""
    if any(node.life.is_closing for node in nodes.values()):
        return []
    version = durable_version(nodes)
    waiting = [node for node in nodes.values() if node.life.waits_to_join]
    return [
        decision
        for node in waiting
        for decision in (Joins(node.node), node_actions(node, node.allow_restore(version)))
    ]


def is_rollback_under_way(nodes: Nodes) -> bool:
    """Whether a rollback is under way. It takes all nodes out of whatever they do together."""
    return any(node.life.is_rolling_back for node in nodes.values())


def may_save(node: NodeTraining, now_s: float, *, is_awaited: bool = False) -> bool:
    """Whether it is time to: a full disk is not asked again at once, nor written too fast.

    `is_awaited`: training rests until it is done, so that its bytes do not count.
    """
    saves = node.work.saves
    return saves.may_request(now_s) and (is_awaited or saves.schedule.is_within_bound(now_s))


def give_up(members: Iterable[NodeTraining], reason: str) -> list[Decision]:
    """Take all nodes back to the newest checkpoint: some may be where others never came to."""
    return [node_actions(node, node.close(reason)) for node in members]
