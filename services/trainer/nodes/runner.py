"""Carries out the nodes' decisions: sends messages, keeps the book, and starts what takes time."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import isfinite
from statistics import fmean

from services.trainer.checkpoints.checkpointing import Checkpointing
from services.trainer.checkpoints.files import CheckpointFiles
from services.trainer.checkpoints.manifests import Verdict
from services.trainer.checkpoints.newest import NewestCheckpoints
from services.trainer.checkpoints.rollbacks import Rollbacks
from services.trainer.checkpoints.verdicts import Verdicts
from services.trainer.intake.microbatches import TrainingBatch
from services.trainer.ledger.pending_batches import Ack, BatchBook, Pending
from services.trainer.ledger.progress import Progress
from services.trainer.ledger.rejections import Rejections
from services.trainer.nodes.ask_all import ask_all
from services.trainer.nodes.decisions import (
    Action,
    Applied,
    Closed,
    Feed,
    Halted,
    RequestSave,
    Restore,
    RollBack,
    SaveAbandoned,
    Skipped,
    Step,
    StepsAhead,
    WriteCheckpoint,
)
from services.trainer.nodes.learning_rate import LearningRate
from services.trainer.nodes.node_training import NodeTraining
from services.trainer.outbox import Outbox
from services.trainer.publication.evaluator import Evaluator
from services.trainer.publication.losses import Losses
from services.trainer.publication.publishing import Evaluate, Keep, Publish, Release, Withheld
from services.trainer.settings import TrainerSettings
from shared.bus.base import Bus
from shared.clock import Clock
from shared.errors import BusError
from shared.messages.inference import TaskEnded
from shared.messages.training import (
    BatchApplied,
    Microbatch,
    MicrobatchForward,
    RejectedBatch,
    StepAhead,
    StepOrder,
)
from shared.messages.weights import KeepVersion, PublishVersion, ReleaseVersion
from shared.subjects import ENDED, FORWARD, KEEP, PUBLISH, RELEASE, STEP, STEP_AHEAD

KEEP_TIMEOUT_S = 60.0
MAX_FAILURES = 2
"""A batch whose computation fails so often is rejected: once may be the node's fault."""

log = logging.getLogger(__name__)


class ActionRunner:
    """Changes state at once; whatever takes time runs in `tasks`, and reports back."""

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        bus: Bus,
        clock: Clock,
        book: BatchBook,
        files: CheckpointFiles,
        newest: NewestCheckpoints,
        stream: str,
        begun_after: int,
        tasks: asyncio.TaskGroup,
        outbox: Outbox,
        evaluator: Evaluator,
    ) -> None:
        """`stream`: identity of the training stream; `begun_after`: the sequence before the run's first."""
        self._settings = settings
        assert settings.learning_rate is not None, "the trainer has chosen one"
        self._learning_rate = LearningRate(
            peak=settings.learning_rate,
            decay=settings.learning_rate_schedule,
            warmup_batches=settings.warmup_batches or 0,
            num_batches=settings.learning_rate_batches,
            final=settings.final_learning_rate,
        )
        self._bus = bus
        self._book = book
        self._begun_after = begun_after
        self._tasks = tasks
        self.outbox = outbox
        self.progress = Progress(self.outbox, book, newest.folder_of)
        self.look: Callable[[], None] = lambda: None
        """Called after a node has decided something: whoever decides for several nodes looks at them."""
        self._evaluator = evaluator
        self.changed = asyncio.Event()
        """Set when whoever waits for room, nodes or batches should look again."""
        self.rejections = Rejections(
            bus,
            book=book,
            progress=self.progress,
            acknowledge=self.acknowledge,
            tasks=tasks,
        )
        self.verdicts = Verdicts(
            files, evaluator=evaluator, clock=clock, shares_weights=settings.shares_weights, tasks=tasks
        )
        self._checkpointing = Checkpointing(
            settings,
            bus=bus,
            clock=clock,
            book=book,
            files=files,
            newest=newest,
            stream=stream,
            progress=self.progress,
            verdicts=self.verdicts,
            run=self.run,
            acknowledge=self.acknowledge,
        )
        self.rollbacks = Rollbacks(
            files,
            book=book,
            newest=newest,
            progress=self.progress,
            run_all=self.run_all,
            acknowledge=self.acknowledge,
            tasks=tasks,
        )

    def run(self, node: NodeTraining, actions: Sequence[Action]) -> None:
        """Carry out what `node` has just decided."""
        for action in actions:
            match action:
                case Feed(batch_id=batch_id):
                    self._feed(node, batch_id)
                case StepsAhead():
                    self._step_ahead(node, action)
                case Step():
                    self._step(node, action)
                case Applied():
                    self._applied(node, action)
                case Skipped():
                    self._skipped(action)
                case Halted(reason=reason, unfinished=unfinished):
                    log.error("node %d trains no more: %s", node.node, reason)
                    self._give_back(unfinished)
                case Closed():
                    self._closed(node, action)
                case Publish(version=version):
                    message = PublishVersion(fence=node.fence, version=version)
                    self.outbox.post(PUBLISH.at(node=node.node), message)
                case Release(version=version):
                    self._release(node, version)
                case Keep(version=version):
                    self._tasks.create_task(self._keep(node, version))
                case Evaluate(version=version):
                    loss = self.progress.training_losses.get(node.node)
                    told = partial(self._note_evaluated, node, node.fence, version, loss)
                    self._evaluator.begin(node.node, version, told)
                case Withheld(version=version, reason=reason):
                    log.error("node %d: version %d is not served: %s", node.node, version, reason)
                case SaveAbandoned(version=version, reason=reason):
                    log.error("node %d: no checkpoint of version %d: %s", node.node, version, reason)
                case Restore():
                    self._tasks.create_task(self._checkpointing.restore(node, action))
                case RequestSave():
                    self._tasks.create_task(self._checkpointing.request_save(node, action))
                case WriteCheckpoint():
                    self._tasks.create_task(self._checkpointing.write(node, action))
                case RollBack():
                    self._forget(node.node)
                    self._give_back(action.unfinished)
                    self.rollbacks.note_closed(node.node)
        if actions:
            self.changed.set()
        self.look()

    def run_all(self, decided: Iterable[tuple[NodeTraining, Sequence[Action]]]) -> None:
        """Carry out the decisions of several nodes; all are decided before the first is carried out."""
        for node, actions in decided:
            self.run(node, actions)

    def acknowledge(self, acks: Iterable[Ack]) -> None:
        """Acknowledge the finished messages to the stream, and wake whoever waits for room."""
        self.changed.set()
        self._tasks.create_task(_acknowledge(list(acks)))

    def end(self, pending: Iterable[Pending]) -> None:
        """Tell the scheduler that these batches no longer occupy a node."""
        for each in pending:
            ended = TaskEnded(task_ids=(each.batch.batch_id,))
            self.outbox.post(ENDED.at(), ended, traceparent=each.traceparent)

    def _feed(self, node: NodeTraining, batch_id: str) -> None:
        pending = self._book.pending[batch_id]
        for index, rows in enumerate(pending.batch.microbatches):
            microbatch = Microbatch(
                fence=node.fence,
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
            self.outbox.post(FORWARD.at(node=node.node, stage=0), message, traceparent=pending.traceparent)

    def _step_ahead(self, node: NodeTraining, step: StepsAhead) -> None:
        pending, limit = self._book.pending[step.batch_id], self._settings.max_gradient_norm
        message = StepAhead(
            fence=node.fence,
            batch_id=step.batch_id,
            version=step.version,
            learning_rate=self._rate_of(pending.batch),
            max_gradient_norm=limit if isfinite(limit) else None,
            keep=step.is_kept,
        )
        self.outbox.post(STEP_AHEAD.at(node=node.node), message, traceparent=pending.traceparent)

    def _step(self, node: NodeTraining, step: Step) -> None:
        pending = [self._book.pending[batch_id] for batch_id in step.rate_of or (step.batch_id,)]
        order = StepOrder(
            fence=node.fence,
            batch_id=step.batch_id,
            version=step.version,
            learning_rate=fmean(self._rate_of(each.batch) for each in pending),
            gradient_scale=step.gradient_scale,
            skip=step.is_skipped,
            keep=step.is_kept,
        )
        self.outbox.post(STEP.at(node=node.node, stage=0), order, traceparent=pending[0].traceparent)

    def _rate_of(self, batch: TrainingBatch) -> float:
        """The batch's learning rate. It ignores earlier batches' fates, so it is the same after a restart."""
        num_before = batch.sequence - self._begun_after - 1
        return self._learning_rate.at(num_before) * batch.learning_rate_multiplier

    def _release(self, node: NodeTraining, version: int) -> None:
        message = ReleaseVersion(fence=node.fence, version=version)
        for stage in range(node.num_stages):
            self.outbox.post(RELEASE.at(node=node.node, stage=stage), message)

    async def _keep(self, node: NodeTraining, version: int) -> None:
        fence = node.fence
        refusals = await ask_all(
            self._bus,
            KEEP,
            KeepVersion(fence=fence, version=version),
            node=node.node,
            num_stages=node.num_stages,
            timeout_s=KEEP_TIMEOUT_S,
        )
        for stage, reason in refusals.items():
            log.warning("node %d, stage %d does not keep version %d: %s", node.node, stage, version, reason)
        self.run(node, node.kept(fence, version, not refusals))

    def _note_evaluated(
        self,
        node: NodeTraining,
        fence: int,
        version: int,
        training_loss: float | None,
        losses: Losses | None,
    ) -> None:
        self.run(node, node.evaluated(fence, version, losses))
        if losses is None or fence != node.fence:
            return
        publishing = node.work.publishing
        verdict = Verdict(
            version,
            losses,
            may_serve=publishing.published == version,
            rise=publishing.rise(losses.held_out),
            why_withheld=publishing.why_withheld(version),
            training_loss=training_loss,
        )
        self.verdicts.add(node.node, verdict)

    def _forget(self, node: int) -> None:
        """The node goes back: what its newer versions were is of no use."""
        self.verdicts.forget(node)
        self.progress.training_losses.pop(node, None)

    def _skipped(self, skipped: Skipped) -> None:
        """Put the skipped batch aside: applied, it would have ruined the weights."""
        self.end([self._book.pending[skipped.batch_id]])
        self._drop(skipped.batch_id, f"its gradients are not finite (loss {skipped.loss:g})")

    def _applied(self, node: NodeTraining, applied: Applied) -> None:
        pending = self._book.apply(node.node, applied.batch_id)
        self.end([pending])
        pending.applied = BatchApplied(
            batch_id=applied.batch_id,
            node=node.node,
            version=applied.version,
            loss=applied.loss,
            num_tokens=pending.batch.num_tokens,
        )
        self.progress.tell(pending.applied, traceparent=pending.traceparent)
        pending.span.set_attributes(
            {"lemix.node": node.node, "lemix.weights_version": applied.version, "lemix.loss": applied.loss}
        )
        pending.span.end()
        log.info(
            "batch %s: node %d, version %d, loss %.4f",
            applied.batch_id,
            node.node,
            applied.version,
            applied.loss,
        )

    def _closed(self, node: NodeTraining, closed: Closed) -> None:
        self._forget(node.node)
        lost = self._book.roll_back(node.node)
        given_back = lost + closed.unfinished
        log.warning("node %d: %s; %d batches will run again", node.node, closed.reason, len(given_back))
        self.end(self._book.pending[batch_id] for batch_id in closed.unfinished)
        failed = self._at_fault(closed)
        hopeless = failed if failed in given_back and self._is_hopeless(failed) else None
        self._book.wait(batch_id for batch_id in given_back if batch_id != hopeless)
        if hopeless is not None:
            self._drop(hopeless, closed.reason)

    def _give_back(self, unfinished: Sequence[str]) -> None:
        self.end(self._book.pending[batch_id] for batch_id in unfinished)
        self._book.wait(unfinished)

    def _at_fault(self, closed: Closed) -> str | None:
        """The batch to blame, or None: one that finds no memory may yet be offloaded."""
        pending = self._book.pending.get(closed.unfit) if closed.unfit else None
        if pending is None or pending.offload:
            return closed.failed or closed.unfit
        pending.num_unfit += 1
        return closed.failed

    def _is_hopeless(self, batch_id: str) -> bool:
        """Count one more failure of the batch; with the first one the node has a new fence."""
        pending = self._book.pending[batch_id]
        pending.num_failures += 1
        return pending.num_failures >= MAX_FAILURES

    def _drop(self, batch_id: str, reason: str) -> None:
        pending = self._book.drop(batch_id)
        pending.span.end()
        batch = pending.batch
        rejected = RejectedBatch.of(batch.body, batch_id=batch_id, sequence=batch.sequence, reason=reason)
        self.rejections.add(rejected, pending.acks)


async def _acknowledge(acks: list[Ack]) -> None:
    for ack in acks:
        try:
            await ack()
        except BusError as error:
            # The durable checkpoints say what is done; the stream's own account is for people.
            log.warning("a training message is not acknowledged: %s", error)
