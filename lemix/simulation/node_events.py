"""Nodes that change during a run: they join, leave, fail, or become slower. Pure."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from shared.errors import ConfigurationError

EventKind = Literal["join", "leave", "fail", "slow"]

FORM = "'SECONDS s: join|leave|fail NODE' or 'SECONDS s: slow NODE FACTOR'"
_WRITTEN = re.compile(
    rf"(?P<at>[\d.]+) ?s?: *(?P<kind>{'|'.join(get_args(EventKind))}) +(?P<node>\d+)(?: +(?P<factor>[\d.]+))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEvent:
    """Something that happens to one node, unannounced."""

    at_s: float
    """After the cluster is ready."""
    kind: EventKind
    """`join`: it starts, for the first time or again; `leave`: its stages stop and say so; `fail`: they are
    gone without a word; `slow`: its devices take longer from now on."""
    node: int
    factor: float = 1.0
    """`slow`: times that an op takes as long as the node's profile says; until the node joins again."""


def node_event(text: str) -> NodeEvent:
    """Read one as a person writes it, in the FORM. Raises ConfigurationError with the text."""
    found = _WRITTEN.fullmatch(text.strip())
    if found is None or (found["kind"] == "slow") != (found["factor"] is not None):
        raise ConfigurationError(f"event {text!r} is not of the form {FORM}")
    kind: EventKind = next(each for each in get_args(EventKind) if each == found["kind"])
    at_s, factor = (_number(text, found[name] or "1") for name in ("at", "factor"))
    if factor <= 0:
        raise ConfigurationError(f"event {text!r}: the factor must be greater than 0")
    return NodeEvent(at_s=at_s, kind=kind, node=int(found["node"]), factor=factor)


def _number(text: str, written: str) -> float:
    try:
        return float(written)
    except ValueError as error:
        raise ConfigurationError(f"event {text!r}: {written!r} is no number") from error


def in_order(events: Iterable[NodeEvent], num_nodes: int) -> tuple[NodeEvent, ...]:
    """Sort events by time. Raises ConfigurationError when one cannot happen to its node then.

    Nodes 0 .. `num_nodes` - 1 are there at the beginning.
    """
    there = set(range(num_nodes))
    ordered = tuple(sorted(events, key=lambda event: event.at_s))
    for event in ordered:
        if (event.kind == "join") == (event.node in there):
            standing = "there already" if event.kind == "join" else "not there"
            raise ConfigurationError(
                f"event '{event.at_s:g} s: {event.kind} {event.node}': node {event.node} is {standing}"
            )
        if event.kind == "join":
            there.add(event.node)
        elif event.kind != "slow":
            there.remove(event.node)
    return ordered
