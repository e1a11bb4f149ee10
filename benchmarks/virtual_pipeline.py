"""One node in this process: real weights and gradients, the trainer's own schedule, in virtual time.

The order of all that happens is that of stages which take 1 unit for a forward, 2 for a backward and 1 for a
step, and of messages that take no time; it is the same in every run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count

import torch
from torch import Tensor

from services.stage_worker.compute.slices import finish
from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.pipeline.disciplines import WorkKind
from services.stage_worker.training.microbatches import MicrobatchRunner
from services.stage_worker.training.preferences import Reference
from shared.messages.training import Microbatch
from shared.model.attention import PackedSegments
from shared.model.stage import Stage
from shared.pipeline import Pipeline, Schedule, Shape, Slot

FORWARD_UNITS, BACKWARD_UNITS, STEP_UNITS = 1, 2, 1


@dataclass(frozen=True, slots=True)
class Part:
    """A microbatch and its tokens."""

    microbatch: Microbatch
    tokens: tuple[int, ...]


@dataclass(slots=True)
class VirtualStage:
    """The state of one stage worker: weights, microbatches in flight, and work that waits for it."""

    stage: Stage
    weights: StageWeights
    runner: MicrobatchRunner = field(init=False)
    waiting: list[tuple[WorkKind, int, int, Callable[[], None]]] = field(default_factory=list)
    """Kind, order of arrival, duration in units, work."""
    is_busy: bool = False

    def __post_init__(self) -> None:
        self.runner = MicrobatchRunner(
            self.stage, self.weights, torch.device("cpu"), reference=Reference(dict)
        )


class VirtualPipeline:
    """Trains its stages on batches, one after the other, as `schedule` lets them enter."""

    def __init__(
        self, stages: Sequence[VirtualStage], schedule: Schedule, learning_rate: Callable[[int], float]
    ) -> None:
        """`learning_rate`: of the batch with so many before it."""
        self._stages = stages
        self._schedule = schedule
        self._learning_rate = learning_rate
        self._pipeline = Pipeline(len(stages))
        self._parts: dict[tuple[str, int], Part] = {}
        self._num_backward: dict[tuple[int, str], int] = {}
        self._order = count()
        self._now = 0
        self._ends: list[tuple[int, int, int, Callable[[], None]]] = []
        """The ends of running work: when, order, stage, work."""
        self.version = 0
        self.delays = [0] * len(stages)
        """By stage, the largest number of steps between the weights of a forward and those that its
        gradient was applied to."""

    def train(self, batches: Mapping[str, Sequence[Part]]) -> None:
        """Run until every batch is in the weights of all stages."""
        for batch_id, parts in batches.items():
            self._parts.update({(batch_id, part.microbatch.index): part for part in parts})
            self._pipeline = self._pipeline.add(Shape(batch_id, len(parts)))
        self._feed()
        while self._ends:
            self._now, _, number, work = heappop(self._ends)
            self._stages[number].is_busy = False
            work()
            self._feed()
            self._begin(number)
        assert self._pipeline.is_empty

    def _feed(self) -> None:
        while (slot := self._pipeline.upcoming) and self._schedule(self._pipeline):
            self._pipeline = self._pipeline.feed()
            tokens = torch.tensor(self._parts[slot.batch_id, slot.index].tokens)
            self._put_forward(0, slot, tokens)

    def _put_forward(self, number: int, slot: Slot, inputs: Tensor) -> None:
        turns = number == len(self._stages) - 1
        units = FORWARD_UNITS + BACKWARD_UNITS if turns else FORWARD_UNITS
        self._put(number, WorkKind.TRAINING_FORWARD, units, partial(self._forward, number, slot, inputs))

    def _put(self, number: int, kind: WorkKind, units: int, work: Callable[[], None]) -> None:
        self._stages[number].waiting.append((kind, next(self._order), units, work))
        self._begin(number)

    def _begin(self, number: int) -> None:
        stage = self._stages[number]
        if stage.is_busy or not stage.waiting:
            return
        stage.is_busy = True
        chosen = min(stage.waiting, key=lambda item: item[:2])
        stage.waiting.remove(chosen)
        _, order, units, work = chosen
        heappush(self._ends, (self._now + units, order, number, work))

    def _forward(self, number: int, slot: Slot, inputs: Tensor) -> None:
        microbatch = self._parts[slot.batch_id, slot.index].microbatch
        version, outputs = finish(self._stages[number].runner.forward(microbatch, inputs))
        self._note_delay(number, slot, version)
        self._pipeline = self._pipeline.forward_done(number, slot.batch_id, slot.index)
        if number < len(self._stages) - 1:
            self._put_forward(number + 1, slot, outputs)
        else:
            self._backward(number, slot, None)

    def _note_delay(self, number: int, slot: Slot, version: int) -> None:
        applied_to = int(slot.batch_id)
        self.delays[number] = max(self.delays[number], applied_to - version)

    def _backward(self, number: int, slot: Slot, gradient: Tensor | None) -> None:
        stage = self._stages[number]
        of_inputs = finish(stage.runner.backward(slot.batch_id, slot.index, gradient))
        self._pipeline = self._pipeline.backward_done(number, slot.batch_id, slot.index)
        if of_inputs is not None:
            work = partial(self._backward, number - 1, slot, of_inputs)
            self._put(number - 1, WorkKind.BACKWARD, BACKWARD_UNITS, work)
        done = self._num_backward[number, slot.batch_id] = (
            self._num_backward.get((number, slot.batch_id), 0) + 1
        )
        if done == slot.count:
            stage.weights.finish_batch(slot.batch_id)
            squared_norm = stage.weights.squared_norm(slot.batch_id)
            self._pipeline = self._pipeline.gradients_ready(number, slot.batch_id, squared_norm)
            self._order_steps()

    def _order_steps(self) -> None:
        while batch := self._pipeline.complete:
            self.version += 1
            self._pipeline = self._pipeline.order(batch.batch_id, self.version)
            for number in range(len(self._stages)):
                work = partial(self._step, number, batch.batch_id, self.version)
                self._put(number, WorkKind.STEP, STEP_UNITS, work)

    def _step(self, number: int, batch_id: str, version: int) -> None:
        self._stages[number].weights.step(batch_id, self._learning_rate(version - 1), version=version)
        self._pipeline = self._pipeline.step_done(number, batch_id)


def loss_of(stages: Sequence[VirtualStage], texts: Sequence[Sequence[int]]) -> float:
    """Mean over all tokens but each text's first, in nats, with the newest weights."""
    total, num_labels = 0.0, 0
    for text in texts:
        hidden, positions = torch.tensor(text), torch.arange(len(text))
        with torch.no_grad():
            for stage in stages:
                hidden = stage.stage.forward(hidden, positions, PackedSegments((len(text),)))
        labels = torch.tensor(text[1:])
        total += torch.nn.functional.cross_entropy(hidden[:-1], labels, reduction="sum").item()
        num_labels += len(labels)
    return total / num_labels
