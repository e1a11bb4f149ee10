"""The training batches of a workload, published at their times and followed until they are applied."""

import asyncio
from collections.abc import Callable
from functools import partial

import msgspec

from lemix.simulation.record import BatchRecord
from lemix.simulation.sent_requests import TOKEN
from lemix.simulation.workload import PlannedBatch, Workload
from shared.bus.base import Bus, Incoming
from shared.clock import Clock
from shared.messages.training import BatchStepped, MicrobatchEntered, StageReport
from shared.schedule import ScheduleName, is_synchronous
from shared.subjects import BATCHES


class _Sent:
    """A published batch on its way."""

    def __init__(self, batch: PlannedBatch, published_s: float) -> None:
        self.batch = batch
        self.published_s = published_s
        self.num_entered = 0
        """Microbatches that a stage 0 has run forward."""
        self.applied_s: float | None = None
        self.node: int | None = None

    def record(self) -> BatchRecord:
        return BatchRecord(
            published_s=self.published_s,
            num_tokens=self.batch.num_tokens,
            applied_s=self.applied_s,
            node=self.node,
        )


class SentBatches:
    """Publishes batches, and hears from stages what becomes of them."""

    def __init__(
        self,
        *,
        bus: Bus,
        clock: Clock,
        run_id: str,
        schedule: ScheduleName,
        microbatches: int,
        began_s: float,
    ) -> None:
        self._bus = bus
        self._clock = clock
        self._run_id = run_id
        self._schedule = schedule
        self._microbatches = microbatches
        self._began_s = began_s
        self._sent: dict[str, _Sent] = {}
        self._num_applied = 0
        self._changed = asyncio.Event()

    async def send(self, workload: Workload) -> None:
        """Publish every batch when the workload's release says so; returns when all are applied.

        Closed release (the paper's): the next batch comes when its predecessor has passed its first
        stage's forward (async), or has been applied (the others). Waits for ever: cancel it.
        """
        for batch in workload.batches:
            await asyncio.sleep(self._began_s + batch.at_s - self._clock.now_s())
            sent = await self._publish(batch)
            if workload.release == "closed":
                await self._until(partial(self._lets_next_come, sent))
        await self._until(lambda: self._num_applied == len(self._sent))

    async def on_report(self, incoming: Incoming[StageReport]) -> None:
        """Note what has passed a first stage, and what is applied."""
        report = incoming.message
        match report.event:
            case MicrobatchEntered(batch_id=batch_id, index=index):
                if sent := self._sent.get(batch_id):
                    sent.num_entered = max(sent.num_entered, index + 1)
            case BatchStepped(batch_id=batch_id):
                if sent := self._sent.get(batch_id):
                    self._stepped(sent, report.node)
        self._changed.set()

    def records(self) -> tuple[BatchRecord, ...]:
        """One record for each batch that was published."""
        return tuple(sent.record() for sent in self._sent.values())

    def _stepped(self, sent: _Sent, node: int) -> None:
        if sent.applied_s is None:
            sent.applied_s, sent.node = self._now_s(), node
            self._num_applied += 1

    def _lets_next_come(self, sent: _Sent) -> bool:
        if is_synchronous(self._schedule):
            return sent.applied_s is not None
        return sent.num_entered >= min(self._microbatches, len(sent.batch.lengths))

    async def _publish(self, batch: PlannedBatch) -> _Sent:
        batch_id = f"{self._run_id}-{len(self._sent)}"
        sent = self._sent[batch_id] = _Sent(batch, self._now_s())
        await self._bus.publish_durable(BATCHES, _body(batch_id, batch), message_id=batch_id)
        return sent

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _now_s(self) -> float:
        return self._clock.now_s() - self._began_s


def _body(batch_id: str, batch: PlannedBatch) -> bytes:
    examples = batch.examples or [(TOKEN,) * length for length in batch.lengths]
    return msgspec.msgpack.encode({"id": batch_id, "examples": [{"token_ids": each} for each in examples]})
