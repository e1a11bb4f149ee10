"""The training half of a stage worker: microbatches through, gradients back, steps, shards, restores."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from services.stage_worker.compute.executor import ModelFacts
from services.stage_worker.context import WorkerContext, is_inside
from services.stage_worker.pipeline.disciplines import WorkKind
from services.stage_worker.pipeline.progress import microbatch_op, step_op
from services.stage_worker.settings import OF_TRAINING
from services.stage_worker.training.leading import Following, Leader, Leading
from shared import subjects
from shared.bus.base import Incoming
from shared.errors import CarrierError, RefusedError
from shared.messages.base import Done
from shared.messages.training import (
    GradientsReady,
    Microbatch,
    MicrobatchBackward,
    MicrobatchForward,
    SaveFailed,
    ShardSaved,
    StageEvent,
    StageReport,
    StepDone,
    StepOrder,
    TiedGradient,
    TrainingFailed,
)
from shared.messages.weights import KeepVersion, ReleaseVersion, RestoreWeights, SavedWeights, SaveWeights
from shared.tensors.ref import TensorRef

RESTORE_DEADLINE_S = 600.0
KEEP_DEADLINE_S = 60.0
NO_ATTRIBUTES: Mapping[str, int] = {}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Item:
    """Work for a batch, and the tensors that came with it."""

    fence: int
    batch_id: str
    tensors: Sequence[TensorRef]
    work: Callable[[], Awaitable[None]]


class Training:
    """Moves microbatches through this stage. Messages under another fence than its own are ignored."""

    def __init__(
        self,
        context: WorkerContext,
        facts: ModelFacts,
        *,
        group: asyncio.TaskGroup,
        tell_version: Callable[[int], None],
        tell_restored: Callable[[RestoreWeights, bool], Awaitable[None]],
    ) -> None:
        """`tell_restored` also hears whether what serves now is what was kept under its number."""
        settings = self._settings = context.settings
        self._bus = context.bus
        self._telemetry = context.telemetry
        self._executor = context.executor
        self._queue = context.queue
        self._progress = context.progress
        self._group = group
        self._tell_version = tell_version
        self._tell_restored = tell_restored
        self._leader: Leader = (
            Leading(context, enter=self._enter, step=self._order, report=self._report)
            if settings.stage == 0
            else Following(context)
        )
        last = settings.num_stages - 1
        self._tied_peer = (last if settings.stage == 0 else 0) if facts.is_tied_across_stages else None
        self.fence = 0
        """The fence: set as soon as a restore is asked for."""
        self.restored_fence = 0
        """The fence of the last restore that is done."""
        self._chosen_settings = dict(facts.settings)
        self.origin = facts.weights
        """The weights that were loaded last: the present ones are these, or descend from them."""
        self.version = facts.weights.version
        self._is_untouched = True
        """No microbatch has run since the weights were loaded: restoring the same ones is a no-op."""
        self._in_flight: dict[tuple[str, int], Microbatch] = {}
        self._num_backward: dict[str, int] = {}
        self._losses: dict[str, float] = {}
        """The loss of each batch, as far as its microbatches have run forward (last stage)."""
        self._held: dict[str, list[Microbatch]] = {}
        """Microbatches of batches whose backwards wait until all forwards are done (last stage)."""
        self._awaiting_tied: dict[str, Microbatch] = {}
        self._tied: dict[str, TensorRef] = {}
        self._awaiting_order: dict[str, str] = {}
        """Batches whose gradients are complete; the trace that each belongs to."""
        self._kept: dict[int, SavedWeights | None] = {}
        """Versions that the executor keeps for serving: what each was loaded as; None: steps have made it."""
        self._saves: dict[int, SaveWeights] = {}
        """The checkpoints that the trainer wants written, by the version to write."""
        tell_version(self.version)

    async def subscribe(self) -> None:
        """Listen to the trainer and to the neighbours."""
        place = {"node": self._settings.node, "stage": self._settings.stage}
        await self._leader.subscribe()
        if self._settings.stage > 0:
            await self._bus.subscribe(subjects.FORWARD.at(**place), self._on_forward)
            await self._bus.subscribe(subjects.STEP.at(**place), self._on_step)
        await self._bus.subscribe(subjects.BACKWARD.at(**place), self._on_backward)
        await self._bus.respond(subjects.RESTORE.at(**place), self._on_restore)
        await self._bus.respond(subjects.SAVE.at(**place), self._on_save)
        await self._bus.respond(subjects.KEEP.at(**place), self._on_keep)
        await self._bus.subscribe(subjects.RELEASE.at(**place), self._on_release)
        if self._tied_peer is not None:
            await self._bus.subscribe(subjects.TIED.at(**place), self._on_tied)

    # Microbatches

    async def _on_forward(self, incoming: Incoming[MicrobatchForward]) -> None:
        self._enter(incoming.message)

    def _enter(self, message: MicrobatchForward) -> None:
        microbatch = message.microbatch
        item = Item(microbatch.fence, microbatch.batch_id, message.tensors, partial(self._forward, message))
        self.enqueue(WorkKind.TRAINING_FORWARD, item)

    async def _on_backward(self, incoming: Incoming[MicrobatchBackward]) -> None:
        message = incoming.message
        work = partial(self._backward, message.batch_id, message.index, message.gradient)
        self.enqueue(WorkKind.BACKWARD, Item(message.fence, message.batch_id, (message.gradient,), work))

    async def _on_tied(self, incoming: Incoming[TiedGradient]) -> None:
        message = incoming.message
        item = Item(message.fence, message.batch_id, (message.gradient,), partial(self._take_tied, message))
        self.enqueue(WorkKind.STEP, item)

    async def _on_step(self, incoming: Incoming[StepOrder]) -> None:
        self._order(incoming.message)

    def _order(self, order: StepOrder) -> None:
        item = Item(order.fence, order.batch_id, (), partial(self._step, order))
        self.enqueue(WorkKind.STEP, item)

    def enqueue(self, kind: WorkKind, item: Item) -> None:
        """Have it done in its turn, if it is of the present fence, then too."""
        is_current = item.fence == self.fence
        self._queue.put(kind, partial(self._guarded if is_current else self._ignore, item))

    async def _ignore(self, item: Item) -> None:
        """Drop an item of another fence; its tensors' slots in a peer's arena must come free again."""
        log.info("%s of fence %d ignored in fence %d", item.batch_id, item.fence, self.fence)
        for tensor in item.tensors:
            await self._executor.discard(tensor)

    async def _guarded(self, item: Item) -> None:
        """A batch that fails is told of, loudly, and the node is restored; serving goes on."""
        if item.fence != self.fence:  # a restore came while the item waited
            await self._ignore(item)
            return
        self._is_untouched = False
        try:
            await item.work()
        except Exception as error:
            log.exception("training on %s failed", item.batch_id)
            await self.failed(item.fence, item.batch_id, error)

    async def failed(self, fence: int, batch_id: str, error: Exception) -> None:
        """Tell that what the batch needed cannot be done; the trainer restores the node."""
        await self._report(fence, _failure(batch_id, error))

    async def _forward(self, message: MicrobatchForward) -> None:
        microbatch = message.microbatch
        self._in_flight[microbatch.batch_id, microbatch.index] = microbatch
        span = self._microbatch_span("stage.training_forward", microbatch)
        with self._progress.doing(microbatch_op("forward", microbatch)):
            rows = message.hidden or message.tokens
            output = await self._executor.forward(microbatch, rows, message.reference)
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
            self._hold_backward(microbatch)
        else:
            await self._went_backward(microbatch, output.gradient)

    def _hold_backward(self, microbatch: Microbatch) -> None:
        """GPipe: the last stage turns a batch around when all of it is there."""
        held = self._held.setdefault(microbatch.batch_id, [])
        held.append(microbatch)
        if len(held) == microbatch.count:
            for each in self._held.pop(microbatch.batch_id):
                turn = partial(self._backward, each.batch_id, each.index, None)
                self.enqueue(WorkKind.BACKWARD, Item(each.fence, each.batch_id, (), turn))

    async def _backward(self, batch_id: str, index: int, gradient: TensorRef | None) -> None:
        microbatch = self._in_flight[batch_id, index]
        span = self._microbatch_span("stage.training_backward", microbatch)
        with self._progress.doing(microbatch_op("backward", microbatch)):
            of_inputs = await self._executor.backward(batch_id, index, gradient)
        span.end()
        await self._went_backward(microbatch, of_inputs)

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

    # Steps

    async def _finish_batch(self, microbatch: Microbatch) -> None:
        batch_id = microbatch.batch_id
        gradient = await self._executor.finish_batch(batch_id)
        self._awaiting_tied[batch_id] = microbatch
        if gradient is not None and self._tied_peer is not None:
            tied = TiedGradient(fence=microbatch.fence, batch_id=batch_id, gradient=gradient)
            other_end = subjects.TIED.at(node=self._settings.node, stage=self._tied_peer)
            await self._bus.publish(other_end, tied, traceparent=microbatch.traceparent)
        await self._measure_if_complete(batch_id)

    async def _take_tied(self, message: TiedGradient) -> None:
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
        await self.gradients_ready(microbatch.fence, batch_id, squared_norm)

    async def gradients_ready(self, fence: int, batch_id: str, squared_norm: float) -> None:
        """Wait for the order to step: on the batch, or on the mean under that name."""
        self._awaiting_order.setdefault(batch_id, "")
        loss = self._losses.pop(batch_id, 0.0)
        event = GradientsReady(batch_id=batch_id, squared_norm=squared_norm, loss=loss)
        await self._leader.hear(fence, event)

    async def _step(self, order: StepOrder) -> None:
        traceparent = self._awaiting_order.pop(order.batch_id)
        span = self._span("stage.step", traceparent)
        with self._progress.doing(step_op(order.batch_id)):
            await self._executor.step(order)
        self._set_version(order.version)
        if order.keep:
            await self._keep()
        span.end()
        await self._leader.hear(order.fence, StepDone(batch_id=order.batch_id, version=self.version))
        await self._save_if_due()

    async def _keep(self) -> bool:
        """Returns whether nothing else was kept under that number."""
        self._kept[self.version] = self.origin if self._is_untouched else None
        return await self._executor.keep()

    async def _on_keep(self, incoming: Incoming[KeepVersion]) -> Done:
        message = incoming.message
        self.check_fence_is(message.fence)
        return await self._done_in_turn(partial(self._keep_if_present, message), KEEP_DEADLINE_S)

    async def _keep_if_present(self, message: KeepVersion) -> None:
        self.check_fence_is(message.fence)
        if message.version != self.version:
            raise RefusedError(f"this stage is at version {self.version}, not {message.version}", code=409)
        await self._keep()

    async def _done_in_turn(self, work: Callable[[], Awaitable[None]], within_s: float) -> Done:
        """Raises RefusedError when it is too late, or what `work` raises."""
        try:
            await self._queue.do_in_turn(work, within_s=within_s)
        except TimeoutError as error:
            raise RefusedError(f"not done within {within_s:g} s", code=504) from error
        return Done()

    async def _on_release(self, incoming: Incoming[ReleaseVersion]) -> None:
        message = incoming.message
        if message.fence == self.fence:
            self._queue.put(WorkKind.CONTROL, partial(self._release, message.version))

    async def _release(self, version: int) -> None:
        if version in self._kept:
            del self._kept[version]
            await self._executor.release(version)

    async def merged(self, version: int, *, keep: bool) -> None:
        """The stage has gone on from other weights, of that version."""
        self._is_untouched = False
        self._set_version(version)
        self._leader.merged(version)
        if keep:
            await self._keep()

    def _set_version(self, version: int) -> None:
        self.version = version
        self._tell_version(version)

    def _microbatch_span(self, name: str, microbatch: Microbatch) -> Any:
        return self._span(name, microbatch.traceparent, {"lemix.microbatch": microbatch.index})

    def _span(self, name: str, traceparent: str, more: Mapping[str, int] = NO_ATTRIBUTES) -> Any:
        attributes = {"lemix.node": self._settings.node, "lemix.stage": self._settings.stage, **more}
        return self._telemetry.span(name, traceparent=traceparent, attributes=attributes)

    async def _report(self, fence: int, event: StageEvent) -> None:
        """Under the fence of what is reported on: a restore may have begun another one meanwhile."""
        report = StageReport(node=self._settings.node, stage=self._settings.stage, fence=fence, event=event)
        await self._bus.publish(subjects.REPORT.at(), report)

    # Checkpoints

    async def _on_save(self, incoming: Incoming[SaveWeights]) -> Done:
        message = incoming.message
        self._check_fence(message.fence)
        self._check_folder(message.folder)
        if message.version < self.version:
            raise RefusedError(
                f"version {message.version} is gone, this stage holds {self.version}", code=409
            )
        # One is asked for at a time: a later version was to be made by a batch that has been skipped since.
        self._saves = {version: save for version, save in self._saves.items() if version < message.version}
        self._saves[message.version] = message
        self._queue.put(WorkKind.CONTROL, self._save_if_due)
        return Done()

    async def _save_if_due(self) -> None:
        for version in sorted(version for version in self._saves if version <= self.version):
            save = self._saves.pop(version)
            if version < self.version:
                await self._save_failed(save, f"the stage has gone on to version {self.version}")
            else:
                self._group.create_task(self._write(await self._executor.snapshot(), save))

    async def _write(self, snapshot: Any, save: SaveWeights) -> None:
        try:
            shard = await self._executor.write(snapshot, Path(save.folder))
        except OSError as error:
            await self._save_failed(save, str(error))
            return
        saved = ShardSaved(
            version=save.version,
            sha256_by_file=shard.sha256_by_file,
            file_by_tensor=shard.file_by_tensor,
            size_bytes=shard.size_bytes,
            written_bytes=shard.written_bytes,
            adapter=shard.adapter,
            settings=self._settings.told(OF_TRAINING) | self._chosen_settings,
        )
        await self._report(save.fence, saved)

    async def _save_failed(self, save: SaveWeights, reason: str) -> None:
        log.error("checkpoint of version %d not written: %s", save.version, reason)
        await self._report(save.fence, SaveFailed(version=save.version, reason=reason))

    async def _on_restore(self, incoming: Incoming[RestoreWeights]) -> Done:
        message = incoming.message
        self._check_fence(message.fence)
        for weights in (message.weights, message.served):
            if weights and weights.checkpoint:
                self._check_folder(weights.checkpoint)
        self.fence = message.fence
        return await self._done_in_turn(partial(self._restore, message), RESTORE_DEADLINE_S)

    async def _restore(self, message: RestoreWeights) -> None:
        for gradient in self._tied.values():
            await self._executor.discard(gradient)
        self._forget()
        served, is_same = message.served, True
        stays = None if message.serving == "newest" else message.served_version
        for version in self._kept.keys() - {stays}:
            await self._release(version)
        # What steps have made under that number is something else if the stage was away during a rollback.
        if served is not None and self._kept.get(served.version) != served:
            await self._load(served)
            is_same = await self._keep()
        await self._load(message.weights)
        if message.serving != "newest" and served is None:
            is_same = await self._keep()
        self._leader.begin(message)
        self.restored_fence = message.fence
        await self._tell_restored(message, is_same)

    async def _load(self, weights: SavedWeights) -> None:
        """Go on from these weights, which the stage may hold as they were loaded."""
        if not (self._is_untouched and self.origin == weights):
            await self._executor.restore(weights.checkpoint, weights.version)
        self._is_untouched = True
        self.origin = weights
        self._set_version(weights.version)

    def _forget(self) -> None:
        """All training in progress."""
        self._in_flight.clear()
        self._losses.clear()
        self._held.clear()
        self._num_backward.clear()
        self._awaiting_tied.clear()
        self._tied.clear()
        self._awaiting_order.clear()
        self._saves.clear()

    def _check_folder(self, folder: str) -> None:
        """Raises RefusedError: messages must not lead this process to any file there is."""
        allowed = self._settings.checkpoint_dir
        if not is_inside(folder, allowed):
            raise RefusedError(f"{folder} is not in this run's folder of checkpoints {allowed}", code=403)

    def check_fence_is(self, fence: int) -> None:
        """Check the fence. Raises RefusedError when it is not the present one."""
        if fence != self.fence:
            raise RefusedError(f"fence {fence} is not {self.fence}, which this stage follows", code=409)

    def _check_fence(self, fence: int) -> None:
        if fence < self.fence:
            raise RefusedError(f"fence {fence} is over, this stage follows {self.fence}", code=409)


def _failure(batch_id: str, error: Exception) -> TrainingFailed:
    """torch is not loaded here: its out-of-memory error is known by name."""
    names = {kind.__name__ for kind in type(error).__mro__}
    lacks_memory = isinstance(error, MemoryError) or "OutOfMemoryError" in names
    return TrainingFailed(
        batch_id=batch_id,
        reason=f"{type(error).__name__}: {error}",
        is_batch_at_fault=not (lacks_memory or isinstance(error, CarrierError)),
        lacks_memory=lacks_memory,
    )
