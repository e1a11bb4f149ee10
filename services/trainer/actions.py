"""Carries out what nodes decide: messages to stages, files of checkpoints, and the book of batches."""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from services.trainer import rollback_files
from services.trainer.batches import Ack, BatchBook, Pending
from services.trainer.checkpoint_files import (
    CheckpointFiles,
    Evaluated,
    lineage_of,
    manifest_of,
    rolled_back,
    served_instead,
)
from services.trainer.evaluator import Evaluator
from services.trainer.learning_rate import LearningRate
from services.trainer.microbatches import TrainingBatch
from services.trainer.node_actions import (
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
    WriteCheckpoint,
)
from services.trainer.node_training import NodeTraining
from services.trainer.outbox import Outbox
from services.trainer.progress import Progress
from services.trainer.publishing import Evaluate, Publish, Release, Withheld
from services.trainer.rejections import Rejections
from services.trainer.schedules import Slot
from services.trainer.settings import OF_TRAINING, TrainerSettings
from services.trainer.streams import TRAIN_STREAM
from services.trainer.waiting import ask_all
from shared import checkpoints
from shared.bus.base import Bus
from shared.checkpoints import Checkpoint
from shared.clock import Clock
from shared.disk import on_disk
from shared.encoding import LabelledTokens
from shared.errors import BusError, RefusedError
from shared.messages.inference import TaskEnded
from shared.messages.training import (
    BatchApplied,
    Microbatch,
    MicrobatchForward,
    RejectedBatch,
    ShardSaved,
    StepOrder,
)
from shared.messages.weights import (
    PublishVersion,
    ReleaseVersion,
    RestoreWeights,
    SavedWeights,
    SaveWeights,
)
from shared.subjects import ENDED, FORWARD, PUBLISH, RELEASE, RESTORE, SAVE, STEP

RESTORE_TIMEOUT_S = 60.0
SAVE_TIMEOUT_S = 10.0
MAX_FAILURES = 2
"""A batch whose computation fails so often is rejected: once may be the node's fault."""

log = logging.getLogger(__name__)


class Rollback:
    """An order to go back to an older checkpoint, and its answer."""

    def __init__(self, nodes: Sequence[NodeTraining], target: Checkpoint) -> None:
        self.nodes = nodes
        self.target = target
        self.unclosed = {node.node for node in nodes}
        """Until none is, the disk stays as it is."""
        self.num_discarded: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def answer(self, num_discarded: int, failure: str) -> None:
        """Tell whoever still waits for it."""
        if self.num_discarded.done():
            return
        if failure:
            self.num_discarded.set_exception(RefusedError(f"nothing was rolled back: {failure}"))
        else:
            self.num_discarded.set_result(num_discarded)


class ActionRunner:
    """Everything that changes state happens at once; what takes time runs in `tasks`, and reports back."""

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        bus: Bus,
        clock: Clock,
        book: BatchBook,
        files: CheckpointFiles,
        newest: dict[int, Checkpoint],
        stream: str,
        begun_after: int,
        tasks: asyncio.TaskGroup,
        held_out: Sequence[LabelledTokens] = (),
        name: str = "trainer",
    ) -> None:
        """`begun_after`: the sequence before the run's first; `held_out`: examples that versions are
        evaluated on; `name`: this trainer's, as of a gateway.
        """
        self._settings = settings
        self._learning_rate = LearningRate(
            peak=settings.learning_rate,
            decay=settings.learning_rate_schedule,
            warmup_batches=settings.warmup_batches,
            num_batches=settings.learning_rate_batches,
            final=settings.final_learning_rate,
        )
        self._bus = bus
        self._clock = clock
        self._book = book
        self._files = files
        self._newest = newest
        """The newest durable checkpoint of each node that has one."""
        self._stream = stream
        """Identity of the training stream."""
        self._begun_after = begun_after
        self._tasks = tasks
        self._pruning = asyncio.Lock()
        self._rollbacks: dict[int, Rollback] = {}
        """Ordered, by node that is not closed yet."""
        self.outbox = Outbox(bus)
        self.progress = Progress(self.outbox, book, self._folder_of)
        self.look: Callable[[], None] = lambda: None
        """What to do after a node has decided something: whoever decides for several nodes looks at them."""
        self.evaluator = Evaluator(held_out, name=name, bus=bus, clock=clock, outbox=self.outbox)
        self._evaluated_last: dict[int, Evaluated] = {}
        """By node, since it last went back."""
        self.changed = asyncio.Event()
        """Set when whoever waits for room, nodes or batches should look again."""
        self.rejections = Rejections(
            bus,
            book=book,
            progress=self.progress,
            acknowledge=self.acknowledge,
            changed=self.changed,
            tasks=tasks,
        )

    def run(self, node: NodeTraining, actions: Sequence[Action]) -> None:
        """Carry out what `node` has just decided."""
        for action in actions:
            match action:
                case Feed(slot=slot):
                    self._feed(node, slot)
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
                    message = PublishVersion(epoch=node.epoch, version=version)
                    self.outbox.post(PUBLISH.at(node=node.node), message)
                case Release(version=version):
                    self._release(node, version)
                case Evaluate(version=version):
                    told = partial(self._note_evaluated, node, node.epoch, version)
                    self.evaluator.begin(node.node, version, told)
                case Withheld(version=version, loss=loss, limit=limit):
                    log.error(
                        "node %d: version %d is not served: held-out loss %.4f is above %.4f",
                        node.node,
                        version,
                        loss,
                        limit,
                    )
                case SaveAbandoned(version=version, reason=reason):
                    log.error("node %d: no checkpoint of version %d: %s", node.node, version, reason)
                case Restore():
                    self._tasks.create_task(self._restore(node, action))
                case RequestSave():
                    self._tasks.create_task(self._request_save(node, action))
                case WriteCheckpoint():
                    self._tasks.create_task(self._write_checkpoint(node, action))
                case RollBack():
                    self._forget_evaluations(node.node)
                    self._give_back(action.unfinished)
                    self._note_closed(self._rollbacks.pop(node.node), node)
        if actions:
            self.changed.set()
        self.look()

    async def roll_back(self, nodes: Sequence[NodeTraining], target: Checkpoint) -> int:
        """Have one node, or all that share their weights, go back to `target` for good; returns how many
        batches are discarded.

        Raises RefusedError when the disk refuses: then they are as they were.
        """
        decided = [(node, node.roll_back(target.manifest.version)) for node in nodes]
        rollback = Rollback(nodes, target)
        self._rollbacks |= {node.node: rollback for node in nodes}
        self._run_all(decided)
        return await rollback.num_discarded

    def acknowledge(self, acks: Iterable[Ack]) -> None:
        """Tell the stream what is done with for good."""
        self._tasks.create_task(_acknowledge(list(acks)))

    def end(self, pending: Iterable[Pending]) -> None:
        """Tell the scheduler that these batches no longer occupy a node."""
        for each in pending:
            ended = TaskEnded(task_ids=(each.batch.batch_id,))
            self.outbox.post(ENDED.at(), ended, traceparent=each.traceparent)

    def _run_all(self, decided: Iterable[tuple[NodeTraining, Sequence[Action]]]) -> None:
        """Whoever looks at the nodes after the first one's actions finds that all have decided."""
        for node, actions in decided:
            self.run(node, actions)

    def _feed(self, node: NodeTraining, slot: Slot) -> None:
        pending = self._book.pending[slot.batch_id]
        rows = pending.batch.microbatches[slot.index]
        microbatch = Microbatch(
            epoch=node.epoch,
            batch_id=slot.batch_id,
            index=slot.index,
            count=slot.count,
            lengths=rows.lengths,
            label_rows=rows.label_rows,
            labels=rows.labels,
            loss_weight=pending.batch.loss_weight,
            backward_after_all=self._settings.schedule == "gpipe",
            offload=pending.offload,
            traceparent=pending.traceparent,
        )
        message = MicrobatchForward(microbatch=microbatch, tokens=rows.tokens)
        self.outbox.post(FORWARD.at(node=node.node, stage=0), message, traceparent=pending.traceparent)

    def _step(self, node: NodeTraining, step: Step) -> None:
        pending = [self._book.pending[batch_id] for batch_id in step.rate_of or (step.batch_id,)]
        order = StepOrder(
            epoch=node.epoch,
            batch_id=step.batch_id,
            version=step.version,
            learning_rate=fmean(self._rate_of(each.batch) for each in pending),
            gradient_scale=step.gradient_scale,
            skip=step.is_skipped,
            keep=step.is_kept,
        )
        for stage in range(node.num_stages):
            self.outbox.post(STEP.at(node=node.node, stage=stage), order, traceparent=pending[0].traceparent)

    def _rate_of(self, batch: TrainingBatch) -> float:
        """Whatever has become of the batches before it: so it is the same after a restart."""
        num_before = batch.sequence - self._begun_after - 1
        return self._learning_rate.at(num_before) * batch.learning_rate_multiplier

    def _release(self, node: NodeTraining, version: int) -> None:
        message = ReleaseVersion(epoch=node.epoch, version=version)
        for stage in range(node.num_stages):
            self.outbox.post(RELEASE.at(node=node.node, stage=stage), message)

    def _note_evaluated(self, node: NodeTraining, epoch: int, version: int, loss: float | None) -> None:
        self.run(node, node.evaluated(epoch, version, loss))
        if loss is not None and epoch == node.epoch:
            evaluated = Evaluated(version, loss, may_serve=node.publishing.published == version)
            self._evaluated_last[node.node] = evaluated
            self._tasks.create_task(self._write_evaluation(node.node, evaluated))

    def _skipped(self, skipped: Skipped) -> None:
        """The batch is put aside: applied, it would have left nothing of the weights."""
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
        self._forget_evaluations(node.node)
        lost = self._book.roll_back(node.node)
        given_back = lost + closed.unfinished
        log.warning("node %d: %s; %d batches will run again", node.node, closed.reason, len(given_back))
        self.end(self._book.pending[batch_id] for batch_id in closed.unfinished)
        failed = self._at_fault(closed)
        hopeless = failed if failed in given_back and self._is_hopeless(failed) else None
        self._book.wait(batch_id for batch_id in given_back if batch_id != hopeless)
        if hopeless is not None:
            self._drop(hopeless, closed.reason)

    def _forget_evaluations(self, node: int) -> None:
        """The node goes back: the numbers of its newer versions come again, and mean other weights."""
        self.evaluator.drop(node)
        self._evaluated_last.pop(node, None)

    def _give_back(self, unfinished: Sequence[str]) -> None:
        self.end(self._book.pending[batch_id] for batch_id in unfinished)
        self._book.wait(unfinished)

    def _at_fault(self, closed: Closed) -> str | None:
        """A batch that finds no memory may yet be offloaded; one that was cannot be helped."""
        pending = self._book.pending.get(closed.unfit) if closed.unfit else None
        if pending is None or pending.offload:
            return closed.failed or closed.unfit
        pending.num_unfit += 1
        return closed.failed

    def _is_hopeless(self, batch_id: str) -> bool:
        """Count one more failure of the batch; an epoch ends with the first."""
        pending = self._book.pending[batch_id]
        pending.num_failures += 1
        return pending.num_failures >= MAX_FAILURES

    def _drop(self, batch_id: str, reason: str) -> None:
        pending = self._book.drop(batch_id)
        pending.span.end()
        batch = pending.batch
        rejected = RejectedBatch.of(batch.body, batch_id=batch_id, sequence=batch.sequence, reason=reason)
        self.rejections.add(rejected, pending.acks)

    async def _restore(self, node: NodeTraining, action: Restore) -> None:
        weights = checkpoints.as_saved(self._newest_of(node.node))
        message = RestoreWeights(
            epoch=action.epoch,
            weights=weights,
            serving=self._settings.serving,
            served=await self._served_instead(node.node, weights.version),
        )
        refusals = await ask_all(
            self._bus,
            RESTORE,
            message,
            node=node.node,
            num_stages=action.num_stages,
            timeout_s=RESTORE_TIMEOUT_S,
        )
        failure = "; ".join(f"stage {stage}: {reason}" for stage, reason in refusals.items())
        restored = node.restored(action.epoch, failure, self._clock.now_s(), served=message.served_version)
        self.run(node, restored)

    async def _served_instead(self, node: int, version: int) -> SavedWeights | None:
        """What a guard has let serve, where that is not the version that the node goes on from."""
        if not self._settings.held_out:
            return None
        async with self._pruning:
            serving = await on_disk(lambda: self._files.serving(self._nodes_like(node)))
        return served_instead(serving, version)

    def _nodes_like(self, node: int) -> list[int]:
        return checkpoints.nodes_like(self._files.root, node, merge=self._settings.merging)

    def _newest_of(self, node: int) -> Checkpoint | None:
        """The node's newest durable checkpoint; of any node, where they share their weights."""
        if self._settings.merging == "none":
            return self._newest.get(node)
        return max(self._newest.values(), key=lambda each: each.manifest.version, default=None)

    def _folder_of(self, node: int) -> Path | None:
        newest = self._newest_of(node)
        return newest.folder if newest else None

    async def _request_save(self, node: NodeTraining, action: RequestSave) -> None:
        folder = self._files.temporary(node.node, action.version, action.epoch)
        stages = range(action.num_stages)
        try:
            await on_disk(partial(self._files.begin, folder))
        except OSError as error:
            refusals = dict.fromkeys(stages, f"not asked: {error}")
        else:
            message = SaveWeights(epoch=action.epoch, version=action.version, folder=str(folder))
            refusals = await ask_all(
                self._bus,
                SAVE,
                message,
                node=node.node,
                num_stages=action.num_stages,
                timeout_s=SAVE_TIMEOUT_S,
            )
        self.run(node, node.save_answered(action.epoch, action.version, refusals, self._clock.now_s()))

    async def _write_checkpoint(self, node: NodeTraining, action: WriteCheckpoint) -> None:
        manifest = manifest_of(
            self._book.ledger,
            node.node,
            action.version,
            num_stages=action.num_stages,
            model=self._settings.model,
            stream=self._stream,
            merge=self._settings.merging,
            settings=self._settings.told(OF_TRAINING) | _settings_of(action.shards.values()),
            may_serve=not self._settings.held_out,
            wall_s=self._clock.wall_s(),
        )
        folder = self._files.temporary(node.node, action.version, node.epoch)
        failure = ""
        try:
            checkpoint = await on_disk(partial(self._files.finish, folder, manifest, action.shards.values()))
        except OSError as error:
            failure = str(error)
        else:
            for evaluated in self._evaluations_of(node.node):  # before there was a checkpoint, maybe
                await self._write_evaluation(node.node, evaluated)
            self._newest[node.node] = checkpoint
            saved = self._book.saved_by(node.node, action.version)
            self.acknowledge(self._book.make_durable(node.node, action.version))
            self.progress.tell_durable(saved, node.node, action.version)
            self.changed.set()
        self.run(node, node.checkpoint_written(action.version, failure, self._clock.now_s()))
        if not node.is_rolling_back:  # which may need the oldest of them
            await self._prune(node.node)

    def _note_closed(self, rollback: Rollback, node: NodeTraining) -> None:
        rollback.unclosed.remove(node.node)
        if not rollback.unclosed:
            self._tasks.create_task(self._roll_back(rollback))

    async def _roll_back(self, rollback: Rollback) -> None:
        manifest, ledger, merge = rollback.target.manifest, self._book.ledger, self._settings.merging
        # Where weights are shared, nodes that do not run now would else bring newer ones back.
        numbers = {manifest.node} if merge == "none" else {*ledger.lineages, manifest.node}
        num_discarded = ledger.num_contained(numbers) - manifest.version
        after = ledger.go_back(numbers, lineage_of(manifest))
        failure = ""
        try:
            async with self._pruning:
                intended = rolled_back(manifest, after, merge=merge)
                await on_disk(partial(rollback_files.intend, self._files.root, intended))
                await on_disk(partial(rollback_files.complete, self._files.root, manifest.node))
        except OSError as error:
            failure = str(error)
        else:
            self._go_back(numbers, rollback.target)
        self._run_all([(node, node.rolled_back(failure)) for node in rollback.nodes])
        rollback.answer(num_discarded, failure)

    def _go_back(self, numbers: Collection[int], target: Checkpoint) -> None:
        """On the disk these nodes have gone back."""
        for number in numbers:
            self._newest.pop(number, None)
        self._newest[target.manifest.node] = target
        before = self._book.ledger.discarded_ids
        self.acknowledge(self._book.go_back(numbers, lineage_of(target.manifest)))
        after = self._book.ledger.discarded_ids
        self.progress.tell_discarded([batch_id for batch_id in after if batch_id not in before])
        log.warning("nodes %s go back to version %d", sorted(numbers), target.manifest.version)

    def _evaluations_of(self, node: int) -> list[Evaluated]:
        """By this node, or by any, where they share their weights."""
        by_node = self._evaluated_last
        return (
            list(by_node.values())
            if self._settings.merging != "none"
            else [evaluated for number, evaluated in by_node.items() if number == node]
        )

    async def _write_evaluation(self, node: int, evaluated: Evaluated) -> None:
        """In the manifest of its version, if that has a checkpoint."""
        try:
            async with self._pruning:
                await on_disk(lambda: self._files.note_evaluation(self._nodes_like(node), evaluated))
        except OSError as error:
            log.warning("node %d: what version %d has shown is not saved: %s", node, evaluated.version, error)

    @property
    def _undecided(self) -> set[int]:
        """Versions that may serve, or may yet, and whose manifests do not say so, maybe."""
        published = {each.version for each in self._evaluated_last.values() if each.may_serve}
        return self.evaluator.versions | published

    async def _prune(self, node: int) -> None:
        """Remove old checkpoints, and then the messages that none of those left would need again."""
        try:
            async with self._pruning:
                await on_disk(partial(self._files.prune, node, self._undecided))
                watermark = await on_disk(self._files.oldest_watermark)
            await self._bus.purge_stream(TRAIN_STREAM.name, watermark)
        except (OSError, BusError) as error:
            log.warning("node %d: old checkpoints or messages stay: %s", node, error)


async def _acknowledge(acks: list[Ack]) -> None:
    for ack in acks:
        try:
            await ack()
        except BusError as error:
            # The durable checkpoints say what is done; the stream's own account is for people.
            log.warning("a training message is not acknowledged: %s", error)


def _settings_of(shards: Iterable[ShardSaved]) -> dict[str, str]:
    return {name: value for shard in shards for name, value in shard.settings.items()}
