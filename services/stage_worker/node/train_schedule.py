"""The training of one node, as its first stage leads it. Pure.

    trainer: feed, step ahead --> held --schedule--> enter --all gradients--> step --all stages--> reported
                                                          '-- no step given that holds --> ask the trainer

The trainer feeds batches ahead, and gives their steps ahead where it can. So nothing has to travel to it and
back between two microbatches, or two batches.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import inf, isfinite, sqrt

from shared.errors import LemixError
from shared.messages.training import (
    BatchReady,
    BatchStepped,
    GradientsReady,
    MicrobatchEntered,
    MicrobatchForward,
    StepAhead,
    StepDone,
    StepOrder,
    TrainingFailed,
)
from shared.pipeline import Pipeline, Shape, schedule_named
from shared.schedule import Feeding, StashingName

MAX_HELD_TOKENS = 1 << 22
"""Four times as many as a message of the training stream has bytes."""
SIGN_OF_LIFE_S = 10.0
"""The trainer hears of a batch that enters once in so long."""


@dataclass(frozen=True, slots=True)
class Enter:
    """Let a microbatch run forward on stage 0."""

    forward: MicrobatchForward


Lead = Enter | StepOrder | MicrobatchEntered | BatchReady | BatchStepped | TrainingFailed
"""The next thing that stage 0 does. A `StepOrder` goes to every stage, the events to the trainer."""


class TrainSchedule:
    """State of one node between two restores. Each method takes what has happened and returns what to do."""

    def __init__(self, num_stages: int, *, feeding: Feeding, stashing: StashingName, version: int) -> None:
        """`version`: of the weights that all stages hold now."""
        self._pipeline = Pipeline(num_stages)
        self._may_enter = schedule_named(feeding.schedule, stashing)
        self._version = version
        """After every step that is ordered."""
        self._held: dict[tuple[str, int], MicrobatchForward] = {}
        """Fed and not entered."""
        self._num_held_tokens = 0
        self._ahead: dict[str, StepAhead] = {}
        """Steps that were given before the gradients were there."""
        self._asked: dict[str, float] = {}
        """Batches that wait for an order, with their squared norms."""
        self._losses: defaultdict[str, float] = defaultdict(float)
        self._ordered: dict[str, StepOrder] = {}
        """Steps that not every stage has done."""
        self._stepped: defaultdict[str, set[int]] = defaultdict(set)
        self._norms: defaultdict[str, dict[int, float]] = defaultdict(dict)
        """The squared norms of steps that this node makes with others and has no batch for, by stage."""
        self._told_s = 0.0

    # The trainer's part

    def feed(self, forward: MicrobatchForward) -> list[Lead]:
        """A microbatch may enter. Raises LemixError when too many are held: the trainer does not keep to its
        credits.
        """
        microbatch = forward.microbatch
        self._num_held_tokens += len(forward.tokens)
        if self._num_held_tokens > MAX_HELD_TOKENS:
            raise LemixError(f"{self._num_held_tokens} tokens of training are waiting on this node already")
        self._held[microbatch.batch_id, microbatch.index] = forward
        if microbatch.index == 0:
            self._pipeline = self._pipeline.add(Shape(microbatch.batch_id, microbatch.count))
        return self._enter()

    def step_ahead(self, step: StepAhead) -> list[Lead]:
        """The step of a batch is given before its gradients are there, or given anew."""
        self._ahead[step.batch_id] = step
        squared_norm = self._asked.get(step.batch_id)
        if squared_norm is not None and self._is_valid(step, squared_norm):
            return [self._order(_order_of(step, squared_norm)), *self._step()]
        return []

    def order(self, order: StepOrder) -> list[Lead]:
        """The trainer has decided a step of which it was asked."""
        return [self._order(order), *self._step()]

    def merged(self, version: int) -> None:
        """The stages have gone on from other weights, of that version."""
        self._version = version

    # The stages' part

    def left(self, batch_id: str, index: int, now_s: float) -> list[Lead]:
        """Stage 0 has run a microbatch forward."""
        self._pipeline = self._pipeline.forward_done(0, batch_id, index)
        entered: list[Lead] = []
        is_last = not any(shape.batch_id == batch_id for shape in self._pipeline.queue)
        if is_last or now_s - self._told_s >= SIGN_OF_LIFE_S:
            self._told_s = now_s
            entered.append(MicrobatchEntered(batch_id=batch_id, index=index))
        return self._enter() + entered

    def came_back(self, batch_id: str, index: int) -> list[Lead]:
        """Stage 0 has run a microbatch backward."""
        self._pipeline = self._pipeline.backward_done(0, batch_id, index)
        return self._enter()

    def gradients_ready(self, stage: int, event: GradientsReady) -> list[Lead]:
        """A stage has all of a batch's gradients, or the mean over several nodes that takes their place."""
        batch_id, squared_norm = event.batch_id, event.squared_norm
        if self._pipeline.open_batch(batch_id) is None:
            return self._mean_ready(stage, event)
        self._losses[batch_id] += event.loss
        self._pipeline = self._pipeline.gradients_ready(stage, batch_id, squared_norm)
        return self._step()

    def step_done(self, stage: int, event: StepDone) -> list[Lead]:
        """A stage has stepped, or skipped."""
        batch_id, version = event.batch_id, self._ordered[event.batch_id].version
        if event.version != version:
            reason = f"stage {stage} is at version {event.version} after {batch_id}, not at {version}"
            return [TrainingFailed(batch_id=batch_id, reason=reason, is_batch_at_fault=False)]
        self._pipeline = self._pipeline.step_done(stage, batch_id)
        self._stepped[batch_id].add(stage)
        if len(self._stepped[batch_id]) < self._pipeline.num_stages:
            return []
        del self._ordered[batch_id], self._stepped[batch_id]
        loss = self._losses.pop(batch_id, 0.0)
        return [*self._enter(), BatchStepped(batch_id=batch_id, version=version, loss=loss)]

    def _mean_ready(self, stage: int, event: GradientsReady) -> list[Lead]:
        norms = self._norms[event.batch_id]
        norms[stage] = event.squared_norm
        if len(norms) < self._pipeline.num_stages:
            return []
        del self._norms[event.batch_id]
        return [BatchReady(batch_id=event.batch_id, squared_norm=sum(norms.values()))]

    def _enter(self) -> list[Lead]:
        entering: list[Lead] = []
        while (
            (slot := self._pipeline.upcoming)
            and (slot.batch_id, slot.index) in self._held
            and self._may_enter(self._pipeline)
        ):
            self._pipeline = self._pipeline.feed()
            forward = self._held.pop((slot.batch_id, slot.index))
            self._num_held_tokens -= len(forward.tokens)
            entering.append(Enter(forward))
        return entering

    def _step(self) -> list[Lead]:
        """Order the steps that can be, or ask for them."""
        steps: list[Lead] = []
        while batch := self._pipeline.complete:
            batch_id, squared_norm = batch.batch_id, batch.squared_norm
            ahead = self._ahead.get(batch_id)
            if ahead is not None and self._is_valid(ahead, squared_norm):
                steps.append(self._order(_order_of(ahead, squared_norm)))
                continue
            self._asked[batch_id] = squared_norm
            self._pipeline = self._pipeline.gather_anew(batch_id)
            steps.append(BatchReady(batch_id=batch_id, squared_norm=squared_norm))
        return steps

    def _is_valid(self, step: StepAhead, squared_norm: float) -> bool:
        return isfinite(squared_norm) and step.version == self._version + 1

    def _order(self, order: StepOrder) -> StepOrder:
        self._pipeline = self._pipeline.order(order.batch_id, order.version)
        self._version = order.version
        self._ordered[order.batch_id] = order
        self._ahead.pop(order.batch_id, None)
        self._asked.pop(order.batch_id, None)
        return order


def _order_of(step: StepAhead, squared_norm: float) -> StepOrder:
    norm, limit = sqrt(squared_norm), step.max_gradient_norm or inf
    return StepOrder(
        fence=step.fence,
        batch_id=step.batch_id,
        version=step.version,
        learning_rate=step.learning_rate,
        gradient_scale=limit / norm if norm > limit else 1.0,
        keep=step.keep,
    )
