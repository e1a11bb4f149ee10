"""The record of one run, as seen on the bus; the same for simulated and real clusters.

All times are seconds after the run began.
"""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import merge
from typing import Any, NamedTuple, get_args

from shared.messages.events import OpKind

OP_KINDS: tuple[OpKind, ...] = get_args(OpKind)
DIGITS = 9
"""After the point, of the event log's seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """A request and what became of it. By sequence: `lengths`, `nodes`, `token_times_s`, `versions`,
    `losses`."""

    arrived_s: float
    lengths: tuple[int, ...]
    """Tokens of the prompts."""
    ended_s: float
    nodes: tuple[int | None, ...]
    """Where each sequence ran; None when it was never placed."""
    token_times_s: tuple[tuple[float, ...], ...]
    """When each token reached the gateway."""
    versions: tuple[int | None, ...] = ()
    """The weights version that answered last; None: none did."""
    losses: tuple[float | None, ...] = ()
    """Mean over the prompt's tokens but the first, in nats, by the weights that served it; None: it was not
    scored, or not to its end."""
    error: str = ""
    """Why there is no full answer; empty when there is one."""

    @property
    def first_token_s(self) -> float | None:
        """When the last of its sequences had its first token; None when one never had any."""
        if not all(self.token_times_s):
            return None
        return max(times_s[0] for times_s in self.token_times_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """A published training batch."""

    published_s: float
    num_tokens: int
    applied_s: float | None
    """When the last stage of its node had stepped; None: not within the run."""
    node: int | None
    """Where it was applied."""


class Op(NamedTuple):
    """One thing that a stage did; a training op may have stood aside meanwhile."""

    node: int
    stage: int
    kind: OpKind
    start_s: float
    end_s: float
    num_tokens: int
    given_way_s: float = 0.0
    """How long it stood aside between its start and its end."""

    @property
    def device_s(self) -> float:
        """How long it had the device."""
        return self.end_s - self.start_s - self.given_way_s


class OpLog:
    """Ops in the order of their reports, 40 bytes each: a large run has millions."""

    def __init__(self) -> None:
        self._integers = array("i")
        """By op: node, stage, place of its kind in OP_KINDS, tokens."""
        self._times_s = array("d")
        """By op: start, end, given way."""

    def append(self, op: Op) -> None:
        self._integers.extend((op.node, op.stage, OP_KINDS.index(op.kind), op.num_tokens))
        self._times_s.extend((op.start_s, op.end_s, op.given_way_s))

    def __len__(self) -> int:
        return len(self._times_s) // 3

    def __iter__(self) -> Iterator[Op]:
        integers, times_s = iter(self._integers), iter(self._times_s)
        for node, stage, kind, num_tokens in zip(integers, integers, integers, integers, strict=True):
            start_s, end_s, given_way_s = next(times_s), next(times_s), next(times_s)
            yield Op(node, stage, OP_KINDS[kind], start_s, end_s, num_tokens, given_way_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run of one workload on one cluster."""

    num_nodes: int
    """All that were there at the beginning, or did something."""
    num_stages: int
    ended_s: float
    """When everything was over, or the run was cut off."""
    requests: tuple[RequestRecord, ...]
    """In the order of arrival."""
    batches: tuple[BatchRecord, ...]
    """In the order of publishing."""
    ops: OpLog = field(default_factory=OpLog)
    forward_error: float | None = None
    """The scheduler's own: how far it was from the length of each iteration and training forward, as a share
    of that; None: it predicted nothing.
    """
    response_error: float | None = None
    """The same for each request's time from arrival to first token."""


def event_lines(record: RunRecord) -> Iterator[str]:
    """The run as JSON lines, ordered by when each thing was over: requests, batches, ops."""
    requests = sorted(record.requests, key=lambda request: request.ended_s)
    batches = sorted(record.batches, key=_batch_end_s)
    ops = sorted(record.ops, key=lambda op: op.end_s)
    events = merge(
        ((request.ended_s, _request_event(request)) for request in requests),
        ((_batch_end_s(batch), _batch_event(batch)) for batch in batches),
        ((op.end_s, _op_event(op)) for op in ops),
        key=lambda event: event[0],
    )
    for _, event in events:
        yield json.dumps(event, separators=(",", ":")) + "\n"


def _request_event(request: RequestRecord) -> dict[str, Any]:
    return {
        "event": "request",
        "arrived_s": round(request.arrived_s, DIGITS),
        "ended_s": round(request.ended_s, DIGITS),
        "lengths": request.lengths,
        "nodes": request.nodes,
        "token_times_s": [[round(time_s, DIGITS) for time_s in times_s] for times_s in request.token_times_s],
        "error": request.error,
    }


def _batch_end_s(batch: BatchRecord) -> float:
    return math.inf if batch.applied_s is None else batch.applied_s


def _batch_event(batch: BatchRecord) -> dict[str, Any]:
    return {
        "event": "batch",
        "published_s": round(batch.published_s, DIGITS),
        "applied_s": None if batch.applied_s is None else round(batch.applied_s, DIGITS),
        "num_tokens": batch.num_tokens,
        "node": batch.node,
    }


def _op_event(op: Op) -> dict[str, Any]:
    rounded = op._replace(start_s=round(op.start_s, DIGITS), end_s=round(op.end_s, DIGITS))
    rounded = rounded._replace(given_way_s=round(op.given_way_s, DIGITS))
    return {"event": "op", **rounded._asdict()}
