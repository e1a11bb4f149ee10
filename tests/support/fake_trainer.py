"""A trainer played by a script: it reads the durable stream, and its weights are the list of batch ids."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from shared.bus.base import Bus, Incoming, StreamSpec
from shared.messages.training import (
    BatchApplied,
    BatchDeferred,
    BatchDurable,
    BatchesAsked,
    BatchesNow,
    BatchEvent,
    BatchPlaced,
    BatchProgress,
    BatchRejected,
)
from shared.messages.weights import JudgedVersion, NodeWeights, WeightsRequest, WeightsStatus
from shared.subjects import BATCHES, NODE_WEIGHTS, TRAIN_PROGRESS, TRAIN_STATUS
from tests.support.gateway import NODE

STREAM = StreamSpec("LEMIX_TRAIN", (BATCHES,))


@dataclass
class FakeTrainer:
    """Takes batches in one by one, each as soon as `turns` allows one more."""

    bus: Bus
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Every batch that was read and is not a repetition, in order."""
    applied: list[str] = field(default_factory=list)
    durable: list[str] = field(default_factory=list)
    poison: str = ""
    """A batch whose id ends so is rejected."""
    held_out: tuple[int, ...] = ()
    """Positions of the examples of each batch that do not train."""
    is_mute: bool = False
    """Its events are lost; it still answers."""
    defers: bool = False
    num_read: int = 0
    num_repeated: int = 0
    rejected: list[str] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    guard: NodeWeights | None = None
    """The weights as a guard has judged them; None: there is no guard."""

    async def run(self) -> None:
        await self.bus.ensure_stream(STREAM)
        await self.bus.respond(TRAIN_STATUS.at(), self._answer)
        await self.bus.respond(NODE_WEIGHTS.at(), self._weights)
        reader = await self.bus.read_stream(STREAM.name, reader="trainer", after_sequence=0)
        while True:
            if (message := await reader.next(timeout_s=5.0)) is not None:
                await self._take(json.loads(message.body))
                self.num_read = message.sequence

    def allow(self, num_batches: int) -> None:
        for _ in range(num_batches):
            self.turns.release()

    async def save(self) -> None:
        """A checkpoint contains all that was applied."""
        new = tuple(batch_id for batch_id in self.applied if batch_id not in self.durable)
        self.durable += new
        await self.tell(self._durable(new))

    async def roll_back(self) -> None:
        """Roll back: durable batches are in no weights any more."""
        self.rejected += self.durable
        gone, self.durable = self.durable, []
        self.applied = [batch_id for batch_id in self.applied if batch_id not in gone]
        for batch_id in gone:
            await self.tell(BatchRejected(batch_id=batch_id, reason="NaN"))

    async def tell(self, event: BatchEvent) -> None:
        if not self.is_mute:
            await self.bus.publish(TRAIN_PROGRESS.at(), BatchProgress(event=event))

    async def _take(self, body: dict[str, Any]) -> None:
        batch_id = body["id"]
        if batch_id in (*self.applied, *self.rejected):
            self.num_repeated += 1
            return
        self.bodies.append(body)
        if self.defers:
            await self.tell(BatchDeferred(batch_id=batch_id))
        await self.tell(BatchPlaced(batch_id=batch_id, node=NODE))
        await self.turns.acquire()
        if self.poison and batch_id.endswith(self.poison):
            self.rejected.append(batch_id)
            await self.tell(BatchRejected(batch_id=batch_id, reason="NaN"))
            return
        self.applied.append(batch_id)
        await self.tell(self._applied(batch_id))

    def _applied(self, batch_id: str) -> BatchApplied:
        version = self.applied.index(batch_id) + 1
        return BatchApplied(
            batch_id=batch_id,
            node=NODE,
            version=version,
            loss=2.0 / version,
            num_tokens=1,
            held_out=self.held_out,
        )

    def _durable(self, batch_ids: tuple[str, ...]) -> BatchDurable:
        return BatchDurable(
            batch_ids=batch_ids,
            node=NODE,
            version=len(self.durable),
            checkpoint="/c",
            held_out=dict.fromkeys(batch_ids, self.held_out) if self.held_out else {},
        )

    def judge(self, *judged: JudgedVersion, published: int) -> None:
        """A guard has judged these versions, of which one serves."""
        self.guard = node_weights(
            NODE, published=published, judged=judged, newest_judged=judged[-1].version if judged else 0
        )

    async def _weights(self, _: Incoming[WeightsRequest]) -> WeightsStatus:
        return WeightsStatus(nodes=(self.guard or node_weights(NODE, is_guarded=False, published=None),))

    async def _answer(self, incoming: Incoming[BatchesAsked]) -> BatchesNow:
        asked = incoming.message.batch_ids
        durable = tuple(batch_id for batch_id in asked if batch_id in self.durable)
        events: list[BatchEvent] = [self._durable(durable)] if durable else []
        events += [
            self._applied(batch_id)
            for batch_id in asked
            if batch_id in self.applied and batch_id not in durable
        ]
        events += [BatchRejected(batch_id=each, reason="NaN") for each in asked if each in self.rejected]
        known = {*self.applied, *self.rejected, *(body["id"] for body in self.bodies)}
        unknown = tuple(batch_id for batch_id in asked if batch_id not in known)
        self.asked.set()
        return BatchesNow(events=tuple(events), unknown=unknown, read_up_to=self.num_read)


def node_weights(node: int, **fields: Any) -> NodeWeights:
    """The weights of a node with a guard, unless told otherwise."""
    known: dict[str, Any] = {
        "version": 0,
        "durable_version": 0,
        "published": 0,
        "is_guarded": True,
        "held_out_loss": None,
        "samples_loss": None,
        "num_withheld": 0,
        "last_withheld": None,
    }
    return NodeWeights(node=node, **known | fields)
