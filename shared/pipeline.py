"""When the next microbatch enters a node, and the next batch may step: pure functions of what is on its way.

A microbatch enters at stage 0, leaves stage 0 forward, and is in flight until its backward has come
back to stage 0. When every stage has all gradients of a batch it is complete, and all stages are ordered to
step: one decision, from the gradients of all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from shared.schedule import ScheduleName, StashingName


@dataclass(frozen=True, slots=True)
class Shape:
    """The part of a batch that a schedule must know."""

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
        """Whether the batch ends with it."""
        return self.index == self.count - 1


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """A batch that has begun to enter, and that not every stage has stepped for."""

    batch_id: str
    squared_norms: Mapping[int, float] = field(default_factory=dict)
    """The squared norm of the gradients of each stage that has them all."""
    version: int | None = None
    """The version of the weights after its step, once that is ordered."""
    stepped: frozenset[int] = frozenset()
    """Stages that have done as ordered."""

    @property
    def squared_norm(self) -> float:
        """The squared norm of the gradients of all stages, as far as they are known."""
        return sum(self.squared_norms.values())


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The microbatches that are under way through one node, and the batches that wait for it."""

    num_stages: int
    queue: tuple[Shape, ...] = ()
    """Batches not wholly fed."""
    next_index: int = 0
    """The index of the first one in `queue`."""
    at_stage_0: Slot | None = None
    """Fed, and not yet through stage 0's forward."""
    in_flight: tuple[Slot, ...] = ()
    """Fed, and not yet through stage 0's backward."""
    open_batches: tuple[OpenBatch, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.queue and not self.open_batches

    @property
    def upcoming(self) -> Slot | None:
        """The microbatch that enters next."""
        return Slot(self.queue[0].batch_id, self.next_index, self.queue[0].count) if self.queue else None

    @property
    def complete(self) -> OpenBatch | None:
        """The oldest batch whose step is not ordered, if every stage has all its gradients."""
        batch = next((batch for batch in self.open_batches if batch.version is None), None)
        return batch if batch is not None and len(batch.squared_norms) == self.num_stages else None

    def open_batch(self, batch_id: str) -> OpenBatch | None:
        return next((batch for batch in self.open_batches if batch.batch_id == batch_id), None)

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

    def gradients_ready(self, stage: int, batch_id: str, squared_norm: float) -> Self:
        batch = self.open_batch(batch_id)
        if batch is None:
            return self
        return self._with(replace(batch, squared_norms={**batch.squared_norms, stage: squared_norm}))

    def gather_anew(self, batch_id: str) -> Self:
        """Note that other gradients may take the place of the complete batch's, on every stage."""
        batch = self.open_batch(batch_id)
        assert batch is not None
        return self._with(replace(batch, squared_norms={}))

    def order(self, batch_id: str, version: int) -> Self:
        """Note that a batch's step is ordered."""
        batch = self.open_batch(batch_id)
        return self if batch is None else self._with(replace(batch, version=version))

    def step_done(self, stage: int, batch_id: str) -> Self:
        """Note that a stage has stepped; batches that all stages have stepped for leave."""
        batch = self.open_batch(batch_id)
        if batch is None:
            return self
        left = self._with(replace(batch, stepped=batch.stepped | {stage})).open_batches
        return replace(self, open_batches=tuple(b for b in left if len(b.stepped) < self.num_stages))

    def _with(self, changed: OpenBatch) -> Self:
        batches = (changed if batch.batch_id == changed.batch_id else batch for batch in self.open_batches)
        return replace(self, open_batches=tuple(batches))


Schedule = Callable[[Pipeline], bool]
"""Whether the upcoming microbatch may enter now."""


def asynchronous(pipeline: Pipeline) -> bool:
    """A-PP: when its predecessor has left stage 0, and not one per stage is in flight.

    One stage alone has no bubble to fill: there a batch sees the step of the one before.
    """
    if pipeline.num_stages == 1:
        return one_forward_one_backward(pipeline)
    return _has_room(pipeline)


def one_forward_one_backward(pipeline: Pipeline) -> bool:
    """1F1B, S-PP: as in A-PP within a batch; the next batch enters when all stages have stepped."""
    return _has_room(pipeline) and _is_flushed(pipeline)


def gpipe(pipeline: Pipeline) -> bool:
    """GPipe: all of a batch enters, as fast as stage 0 takes it; the next one when all have stepped.

    That no backward runs before all forwards is the last stage's part (`Microbatch.backward_after_all`).
    """
    return pipeline.at_stage_0 is None and _is_flushed(pipeline)


def _has_room(pipeline: Pipeline) -> bool:
    return pipeline.at_stage_0 is None and len(pipeline.in_flight) < pipeline.num_stages


def _is_flushed(pipeline: Pipeline) -> bool:
    return pipeline.next_index > 0 or not pipeline.open_batches


def double_buffered(schedule: Schedule) -> Schedule:
    """The same, but a batch enters only when at most one other has not stepped.

    Its microbatches then see at most two versions of the weights: the newest, and the one before
    (PipeDream-2BW, arXiv 2006.09503).
    """

    def enters(pipeline: Pipeline) -> bool:
        return schedule(pipeline) and (pipeline.next_index > 0 or len(pipeline.open_batches) < 2)

    return enters


def schedule_named(name: ScheduleName, stashing: StashingName) -> Schedule:
    """The schedule, with the room that the weights kept leave."""
    schedule = SCHEDULES[name]
    return double_buffered(schedule) if stashing == "double" else schedule


SCHEDULES: Mapping[ScheduleName, Schedule] = {
    "async": asynchronous,
    "1f1b": one_forward_one_backward,
    "gpipe": gpipe,
    "dp": one_forward_one_backward,
}
