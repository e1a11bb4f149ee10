"""When the next microbatch enters a node: pure functions of what is on its way there.

A microbatch enters at stage 0, leaves stage 0 forward, and is in flight until its backward has come
back to stage 0. After the last backward of a batch each stage steps by itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class Shape:
    """As much of a batch as a schedule must know."""

    batch_id: str
    count: int
    """Microbatches in it."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One microbatch's place in the order."""

    batch_id: str
    index: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the stages step after it."""
        return self.index == self.count - 1


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """A batch that has begun to enter, and that not every stage has stepped for."""

    batch_id: str
    stepped: frozenset[int] = frozenset()
    """Stages that have."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What is on its way through one node, and what waits for it."""

    num_stages: int
    queue: tuple[Shape, ...] = ()
    """Batches not wholly fed."""
    next_index: int = 0
    """Of the first one in `queue`."""
    at_stage_0: Slot | None = None
    """Fed, and not yet through stage 0's forward."""
    in_flight: tuple[Slot, ...] = ()
    """Fed, and not yet through stage 0's backward."""
    open_batches: tuple[OpenBatch, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.queue and not self.open_batches

    @property
    def batch_ids(self) -> tuple[str, ...]:
        """Every batch that is not applied, in order."""
        opened = tuple(batch.batch_id for batch in self.open_batches)
        return opened + tuple(shape.batch_id for shape in self.queue if shape.batch_id not in opened)

    @property
    def upcoming(self) -> Slot | None:
        """The microbatch that enters next."""
        return Slot(self.queue[0].batch_id, self.next_index, self.queue[0].count) if self.queue else None

    def num_steps_to(self, batch_id: str) -> int:
        """Steps until the node contains the batch: 1 for the oldest one."""
        return self.batch_ids.index(batch_id) + 1

    def add(self, shape: Shape) -> Self:
        return replace(self, queue=(*self.queue, shape))

    def feed(self) -> Self:
        """Let the upcoming microbatch enter."""
        slot = self.upcoming
        assert slot is not None
        opened = (*self.open_batches, OpenBatch(slot.batch_id)) if slot.index == 0 else self.open_batches
        return replace(
            self,
            queue=self.queue[1:] if slot.is_last else self.queue,
            next_index=0 if slot.is_last else slot.index + 1,
            at_stage_0=slot,
            in_flight=(*self.in_flight, slot),
            open_batches=opened,
        )

    def forward_done(self, stage: int, batch_id: str, index: int) -> Self:
        slot = self.at_stage_0
        if stage != 0 or slot is None or (slot.batch_id, slot.index) != (batch_id, index):
            return self
        return replace(self, at_stage_0=None)

    def backward_done(self, stage: int, batch_id: str, index: int) -> Self:
        if stage != 0:
            return self
        left = tuple(slot for slot in self.in_flight if (slot.batch_id, slot.index) != (batch_id, index))
        return replace(self, in_flight=left)

    def step_done(self, stage: int, batch_id: str) -> Self:
        """Batches for which all stages have stepped leave: compare `batch_ids` before and after."""
        stepped = (
            replace(batch, stepped=batch.stepped | {stage}) if batch.batch_id == batch_id else batch
            for batch in self.open_batches
        )
        return replace(self, open_batches=tuple(b for b in stepped if len(b.stepped) < self.num_stages))


Schedule = Callable[[Pipeline], bool]
"""Whether the upcoming microbatch may enter now."""


def asynchronous(pipeline: Pipeline) -> bool:
    """A-PP: when its predecessor has left stage 0, and fewer than one per stage are in flight."""
    return pipeline.at_stage_0 is None and len(pipeline.in_flight) < pipeline.num_stages


def synchronous(pipeline: Pipeline) -> bool:
    """S-PP: as in A-PP within a batch; the next batch enters when all stages have stepped."""
    return asynchronous(pipeline) and (pipeline.next_index > 0 or not pipeline.open_batches)


SCHEDULES: Mapping[str, Schedule] = {"async": asynchronous, "sync": synchronous}
