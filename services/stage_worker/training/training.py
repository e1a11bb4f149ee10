"""The training half of a stage worker: microbatches through, gradients back, steps, shards, restores.

fenced_work   the way of all of it through the queue, under the trainer's fence
gradients     microbatches forward and back, until all gradients of a batch are here
leading       stage 0 leads its node, the others tell it how far they are
stage_versions  the present version, and those that are kept for serving
shard_saves   this stage's share of checkpoints
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from services.stage_worker.compute.executor import ModelFacts
from services.stage_worker.context import WorkerContext, check_in_run
from services.stage_worker.pipeline.disciplines import WorkKind
from services.stage_worker.pipeline.progress import step_op
from services.stage_worker.training.fenced_work import FencedWork, Item
from services.stage_worker.training.gradients import Gradients
from services.stage_worker.training.leading import Following, Leader, Leading
from services.stage_worker.training.shard_saves import ShardSaves
from services.stage_worker.training.spans import TrainingSpans
from services.stage_worker.training.stage_versions import StageVersions
from shared import subjects
from shared.bus.base import Incoming
from shared.messages.base import Done
from shared.messages.training import MicrobatchForward, StepDone, StepOrder
from shared.messages.weights import RestoreWeights

RESTORE_DEADLINE_S = 600.0


class Training:
    """Steps and restores; everything else has a part of its own."""

    def __init__(
        self,
        context: WorkerContext,
        facts: ModelFacts,
        *,
        group: asyncio.TaskGroup,
        note_version: Callable[[int], None],
        note_restored: Callable[[RestoreWeights, bool], Awaitable[None]],
    ) -> None:
        """`note_restored` also hears whether what serves now is what was kept under its number."""
        self.work = FencedWork(context, facts.num_slices)
        self.versions = StageVersions(context, facts, work=self.work, note_version=note_version)
        self.restored_fence = 0
        """The fence of the last restore that is done."""
        self._settings = context.settings
        self._bus = context.bus
        self._executor = context.executor
        self._progress = context.progress
        self._note_restored = note_restored
        self._spans = TrainingSpans(context)
        self._leader: Leader = (
            Leading(context, enter=self._enter, step=self._order, report=self.work.report)
            if context.settings.stage == 0
            else Following(context)
        )
        self.gradients = Gradients(context, facts, work=self.work, leader=self._leader, spans=self._spans)
        self._saves = ShardSaves(context, facts, work=self.work, versions=self.versions, group=group)

    async def subscribe(self) -> None:
        """Listen to the trainer and to the neighbours."""
        place = {"node": self._settings.node, "stage": self._settings.stage}
        await self._leader.subscribe()
        await self.gradients.subscribe()
        await self.versions.subscribe()
        await self._saves.subscribe()
        if self._settings.stage > 0:
            await self._bus.subscribe(subjects.STEP.at(**place), self._on_step)
        await self._bus.respond(subjects.RESTORE.at(**place), self._on_restore)

    async def merged(self, version: int, *, keep: bool) -> None:
        """The stage has gone on from other weights, of that version."""
        self.work.has_begun = True
        self.versions.reached(version)
        self._leader.merged(version)
        if keep:
            await self.versions.keep()

    def _enter(self, message: MicrobatchForward) -> None:
        self.gradients.enter(message)

    async def _on_step(self, incoming: Incoming[StepOrder]) -> None:
        self._order(incoming.message)

    def _order(self, order: StepOrder) -> None:
        item = Item(order.fence, order.batch_id, (), partial(self._step, order))
        self.work.enqueue(WorkKind.STEP, item, is_sliced=True)

    async def _step(self, order: StepOrder) -> None:
        span = self._spans.of("stage.step", self.gradients.ordered(order.batch_id))
        with self._progress.doing(step_op(order.batch_id)) as handed:
            handed.took = await self._executor.step(order, partial(self.work.give_way, handed))
        self.versions.reached(order.version)
        if order.keep:
            await self.versions.keep()
        span.end()
        await self._leader.hear(order.fence, StepDone(batch_id=order.batch_id, version=order.version))
        await self._saves.begin_if_due()

    async def _on_restore(self, incoming: Incoming[RestoreWeights]) -> Done:
        message = incoming.message
        for weights in (message.weights, message.served):
            if weights and weights.checkpoint:
                check_in_run(weights.checkpoint, self._settings.checkpoint_dir)
        await self.work.follow(message.fence)
        return await self.work.done_in_turn(partial(self._restore, message), RESTORE_DEADLINE_S)

    async def _restore(self, message: RestoreWeights) -> None:
        await self.gradients.forget()
        self._saves.forget()
        is_same = await self.versions.restore(message)
        self._leader.begin(message)
        self.restored_fence = message.fence
        await self._note_restored(message, is_same)
