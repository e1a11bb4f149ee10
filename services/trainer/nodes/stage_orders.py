"""Sends the stages of a node what the trainer has decided."""

import logging
from math import isfinite
from statistics import fmean

from services.trainer.intake.microbatches import TrainingBatch
from services.trainer.ledger.pending_batches import BatchBook
from services.trainer.nodes.ask_all import ask_all
from services.trainer.nodes.decisions import Action, Step, StepsAhead
from services.trainer.nodes.learning_rate import LearningRate
from services.trainer.nodes.node_training import NodeTraining
from services.trainer.outbox import Outbox
from services.trainer.settings import TrainerSettings
from shared.bus.base import Bus
from shared.messages.training import Microbatch, MicrobatchForward, StepAhead, StepOrder
from shared.messages.weights import KeepVersion, PublishVersion, ReleaseVersion
from shared.subjects import FORWARD, KEEP, PUBLISH, RELEASE, STEP, STEP_AHEAD

KEEP_TIMEOUT_S = 60.0

log = logging.getLogger(__name__)


class StageOrders:
    """Posts messages in order; only `keep` waits for answers."""

    def __init__(
        self, settings: TrainerSettings, *, bus: Bus, book: BatchBook, outbox: Outbox, begun_after: int
    ) -> None:
        """`begun_after`: the stream's sequence before the run's first."""
        assert settings.learning_rate is not None, "the trainer has chosen one"
        self._learning_rate = LearningRate(
            peak=settings.learning_rate,
            decay=settings.learning_rate_schedule,
            warmup_batches=settings.warmup_batches or 0,
            num_batches=settings.learning_rate_batches,
            final=settings.final_learning_rate,
        )
        self._settings = settings
        self._bus = bus
        self._book = book
        self._outbox = outbox
        self._begun_after = begun_after

    def feed(self, node: NodeTraining, batch_id: str) -> None:
        """Send all microbatches of a batch to stage 0."""
        pending = self._book.pending[batch_id]
        for index, rows in enumerate(pending.batch.microbatches):
            microbatch = Microbatch(
                fence=node.life.fence,
                batch_id=batch_id,
                index=index,
                count=len(pending.batch.microbatches),
                lengths=rows.lengths,
                label_rows=rows.label_rows,
                labels=rows.labels,
                loss_weight=pending.batch.loss_weight,
                beta=pending.batch.beta,
                backward_after_all=self._settings.schedule == "gpipe",
                offload=pending.offload,
                traceparent=pending.traceparent,
            )
            message = MicrobatchForward(microbatch=microbatch, tokens=rows.tokens)
            self._outbox.post(FORWARD.at(node=node.node, stage=0), message, traceparent=pending.traceparent)

    def step_ahead(self, node: NodeTraining, step: StepsAhead) -> None:
        """Tell stage 0 how to step on a batch, before its gradients are there."""
        pending, limit = self._book.pending[step.batch_id], self._settings.max_gradient_norm
        message = StepAhead(
            fence=node.life.fence,
            batch_id=step.batch_id,
            version=step.version,
            learning_rate=self._rate_of(pending.batch),
            max_gradient_norm=limit if isfinite(limit) else None,
            keep=step.is_kept,
        )
        self._outbox.post(STEP_AHEAD.at(node=node.node), message, traceparent=pending.traceparent)

    def step(self, node: NodeTraining, step: Step) -> None:
        """Order the step on a batch whose gradients are there, or that it is skipped."""
        pending = [self._book.pending[batch_id] for batch_id in step.rate_of or (step.batch_id,)]
        order = StepOrder(
            fence=node.life.fence,
            batch_id=step.batch_id,
            version=step.version,
            learning_rate=fmean(self._rate_of(each.batch) for each in pending),
            gradient_scale=step.gradient_scale,
            skip=step.is_skipped,
            keep=step.is_kept,
        )
        self._outbox.post(STEP.at(node=node.node, stage=0), order, traceparent=pending[0].traceparent)

    def release(self, node: NodeTraining, version: int) -> None:
        """Tell every stage that it needs to keep this version no longer."""
        message = ReleaseVersion(fence=node.life.fence, version=version)
        for stage in range(node.life.members.num_stages):
            self._outbox.post(RELEASE.at(node=node.node, stage=stage), message)

    def publish(self, node: NodeTraining, version: int) -> None:
        """Have stage 0 serve this version."""
        self._outbox.post(PUBLISH.at(node=node.node), PublishVersion(fence=node.life.fence, version=version))

    async def keep(self, node: NodeTraining, version: int) -> list[Action]:
        """Ask every stage to keep its weights, which are of this version."""
        fence = node.life.fence
        refusals = await ask_all(
            self._bus,
            KEEP,
            KeepVersion(fence=fence, version=version),
            node=node.node,
            num_stages=node.life.members.num_stages,
            timeout_s=KEEP_TIMEOUT_S,
        )
        for stage, reason in refusals.items():
            log.warning("node %d, stage %d does not keep version %d: %s", node.node, stage, version, reason)
        return node.in_life(fence, lambda work: work.publishing.kept(version, not refusals))

    def _rate_of(self, batch: TrainingBatch) -> float:
        """The batch's learning rate. It ignores earlier batches' fates, so it is the same after a restart."""
        num_before = batch.sequence - self._begun_after - 1
        return self._learning_rate.at(num_before) * batch.learning_rate_multiplier
