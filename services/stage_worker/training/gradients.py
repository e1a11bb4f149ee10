"""Microbatches forward and back through this stage, until it has all gradients of their batch."""

from functools import partial

from services.stage_worker.compute.executor import ModelFacts
from services.stage_worker.context import WorkerContext
from services.stage_worker.pipeline.disciplines import WorkKind
from services.stage_worker.pipeline.progress import microbatch_op
from services.stage_worker.training.fenced_work import FencedWork, Item
from services.stage_worker.training.leading import Leader
from services.stage_worker.training.spans import TrainingSpans
from shared import subjects
from shared.bus.base import Incoming
from shared.messages.training import (
    GradientsReady,
    Microbatch,
    MicrobatchBackward,
    MicrobatchForward,
    TiedGradient,
)
from shared.tensors.ref import TensorRef


class Gradients:
    """Passes activations on and gradients back, and tells the leader when those of a batch are complete."""

    def __init__(
        self,
        context: WorkerContext,
        facts: ModelFacts,
        *,
        work: FencedWork,
        leader: Leader,
        spans: TrainingSpans,
    ) -> None:
        settings = self._settings = context.settings
        self._bus = context.bus
        self._executor = context.executor
        self._progress = context.progress
        self._work = work
        self._leader = leader
        self._spans = spans
        last = settings.num_stages - 1
        self._tied_peer = (last if settings.stage == 0 else 0) if facts.is_tied_across_stages else None
        """The stage that has the other end of an embedding that is also the head."""
        self._in_flight: dict[tuple[str, int], Microbatch] = {}
        self._num_backward: dict[str, int] = {}
        self._losses: dict[str, float] = {}
        """The loss of each batch, as far as its microbatches have run forward (last stage)."""
        self._deferred: dict[str, list[Microbatch]] = {}
        """Microbatches of batches whose backwards wait until all forwards are done (last stage)."""
        self._awaiting_tied: dict[str, Microbatch] = {}
        self._tied: dict[str, TensorRef] = {}
        self._awaiting_order: dict[str, str] = {}
        """Batches whose gradients are complete; the trace that each belongs to."""

    async def subscribe(self) -> None:
        """Listen to the neighbours."""
        place = {"node": self._settings.node, "stage": self._settings.stage}
        if self._settings.stage > 0:
            await self._bus.subscribe(subjects.FORWARD.at(**place), self._on_forward)
        await self._bus.subscribe(subjects.BACKWARD.at(**place), self._on_backward)
        if self._tied_peer is not None:
            await self._bus.subscribe(subjects.TIED.at(**place), self._on_tied)

    def enter(self, message: MicrobatchForward) -> None:
        """Run a microbatch forward in its turn."""
        microbatch = message.microbatch
        item = Item(microbatch.fence, microbatch.batch_id, message.tensors, partial(self._forward, message))
        self._work.enqueue(WorkKind.TRAINING_FORWARD, item, is_sliced=True)

    async def ready(self, fence: int, batch_id: str, squared_norm: float) -> None:
        """Wait for the order to step: on the batch, or on the mean under that name."""
        self._awaiting_order.setdefault(batch_id, "")
        loss = self._losses.pop(batch_id, 0.0)
        event = GradientsReady(batch_id=batch_id, squared_norm=squared_norm, loss=loss)
        await self._leader.hear(fence, event)

    def ordered(self, batch_id: str) -> str:
        """Note that the order to step has come; returns the trace that the batch belongs to."""
        return self._awaiting_order.pop(batch_id)

    async def forget(self) -> None:
        """Drop all that is in progress; tensors' slots in a peer's arena must come free again."""
        for gradient in self._tied.values():
            await self._executor.discard(gradient)
        self._in_flight.clear()
        self._losses.clear()
        self._deferred.clear()
        self._num_backward.clear()
        self._awaiting_tied.clear()
        self._tied.clear()
        self._awaiting_order.clear()

    async def _on_forward(self, incoming: Incoming[MicrobatchForward]) -> None:
        self.enter(incoming.message)

    async def _on_backward(self, incoming: Incoming[MicrobatchBackward]) -> None:
        message = incoming.message
        self._enqueue_backward(message.fence, message.batch_id, message.index, message.gradient)

    def _enqueue_backward(
        self, fence: int, batch_id: str, index: int, gradient: TensorRef | None = None
    ) -> None:
        tensors = () if gradient is None else (gradient,)
        item = Item(fence, batch_id, tensors, partial(self._backward, batch_id, index, gradient))
        self._work.enqueue(WorkKind.BACKWARD, item, is_sliced=True)

    async def _on_tied(self, incoming: Incoming[TiedGradient]) -> None:
        message = incoming.message
        item = Item(
            message.fence, message.batch_id, (message.gradient,), partial(self._receive_tied, message)
        )
        self._work.enqueue(WorkKind.STEP, item)

    async def _forward(self, message: MicrobatchForward) -> None:
        microbatch = message.microbatch
        self._in_flight[microbatch.batch_id, microbatch.index] = microbatch
        span = self._spans.of_microbatch("stage.training_forward", microbatch)
        with self._progress.doing(microbatch_op("forward", microbatch)) as handed:
            rows, give_way = message.hidden or message.tokens, partial(self._work.give_way, handed)
            output = await self._executor.forward(microbatch, rows, message.reference, give_way)
            handed.took = output.took
        span.end()
        if output.hidden is not None:
            passed_on = MicrobatchForward(
                microbatch=microbatch, hidden=output.hidden, reference=output.reference
            )
            following = subjects.FORWARD.at(node=self._settings.node, stage=self._settings.stage + 1)
            await self._bus.publish(following, passed_on, traceparent=microbatch.traceparent)
        await self._leader.left(microbatch)
        if output.loss is None:
            return
        self._losses[microbatch.batch_id] = self._losses.get(microbatch.batch_id, 0.0) + output.loss
        if microbatch.backward_after_all:
            self._defer_backward(microbatch)
        else:
            await self._went_backward(microbatch, output.gradient)

    def _defer_backward(self, microbatch: Microbatch) -> None:
        """GPipe: the last stage turns a batch around when all of it is there."""
        deferred = self._deferred.setdefault(microbatch.batch_id, [])
        deferred.append(microbatch)
        if len(deferred) == microbatch.count:
            for each in self._deferred.pop(microbatch.batch_id):
                self._enqueue_backward(each.fence, each.batch_id, each.index)

    async def _backward(self, batch_id: str, index: int, gradient: TensorRef | None) -> None:
        microbatch = self._in_flight[batch_id, index]
        span = self._spans.of_microbatch("stage.training_backward", microbatch)
        with self._progress.doing(microbatch_op("backward", microbatch)) as handed:
            give_way = partial(self._work.give_way, handed)
            output = await self._executor.backward(batch_id, index, gradient, give_way)
            handed.took = output.took
        span.end()
        await self._went_backward(microbatch, output.gradient)

    async def _went_backward(self, microbatch: Microbatch, gradient: TensorRef | None) -> None:
        batch_id, index = microbatch.batch_id, microbatch.index
        del self._in_flight[batch_id, index]
        if gradient is not None:
            passed_back = MicrobatchBackward(
                fence=microbatch.fence, batch_id=batch_id, index=index, gradient=gradient
            )
            preceding = subjects.BACKWARD.at(node=self._settings.node, stage=self._settings.stage - 1)
            await self._bus.publish(preceding, passed_back, traceparent=microbatch.traceparent)
        await self._leader.came_back(microbatch)
        self._num_backward[batch_id] = self._num_backward.get(batch_id, 0) + 1
        if self._num_backward[batch_id] == microbatch.count:
            del self._num_backward[batch_id]
            await self._finish_batch(microbatch)

    async def _finish_batch(self, microbatch: Microbatch) -> None:
        batch_id = microbatch.batch_id
        gradient = await self._executor.finish_batch(batch_id)
        self._awaiting_tied[batch_id] = microbatch
        if gradient is not None and self._tied_peer is not None:
            tied = TiedGradient(fence=microbatch.fence, batch_id=batch_id, gradient=gradient)
            other_end = subjects.TIED.at(node=self._settings.node, stage=self._tied_peer)
            await self._bus.publish(other_end, tied, traceparent=microbatch.traceparent)
        await self._measure_if_complete(batch_id)

    async def _receive_tied(self, message: TiedGradient) -> None:
        self._tied[message.batch_id] = message.gradient
        await self._measure_if_complete(message.batch_id)

    async def _measure_if_complete(self, batch_id: str) -> None:
        """Tell when this stage's gradients are gathered and, for a tied embedding, the other end's too."""
        is_tied = self._tied_peer is not None
        if batch_id not in self._awaiting_tied or (is_tied and batch_id not in self._tied):
            return
        microbatch, tied = self._awaiting_tied.pop(batch_id), self._tied.pop(batch_id, None)
        squared_norm = await self._executor.measure(batch_id, tied)
        self._awaiting_order[batch_id] = microbatch.traceparent
        await self.ready(microbatch.fence, batch_id, squared_norm)
