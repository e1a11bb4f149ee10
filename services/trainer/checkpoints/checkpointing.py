"""Has the stages load checkpoints and write them, and makes the written ones durable."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from services.trainer.checkpoints.files import CheckpointFiles
from services.trainer.checkpoints.manifests import manifest_of, served_instead
from services.trainer.checkpoints.newest import NewestCheckpoints
from services.trainer.checkpoints.verdicts import Verdicts
from services.trainer.ledger.pending_batches import Ack, BatchBook
from services.trainer.ledger.progress import Progress
from services.trainer.nodes.ask_all import ask_all
from services.trainer.nodes.decisions import Action, RequestSave, Restore, WriteCheckpoint
from services.trainer.nodes.lease import TrainerLease
from services.trainer.nodes.node_training import NodeTraining
from services.trainer.settings import OF_TRAINING, TrainerSettings
from services.trainer.streams import TRAIN_STREAM
from shared import checkpoints
from shared.bus.base import Bus
from shared.checkpoints import Manifest
from shared.clock import Clock
from shared.disk import on_disk
from shared.errors import BusError
from shared.messages.training import ShardSaved
from shared.messages.weights import RestoreWeights, SavedWeights, SaveWeights
from shared.subjects import RESTORE, SAVE

RESTORE_TIMEOUT_S = 60.0
SAVE_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class Checkpointing:
    """Loads and saves. Each method takes its time, tells the node of it, and returns what that decides."""

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        bus: Bus,
        clock: Clock,
        book: BatchBook,
        files: CheckpointFiles,
        lease: TrainerLease,
        newest: NewestCheckpoints,
        stream: str,
        progress: Progress,
        verdicts: Verdicts,
        acknowledge: Callable[[Iterable[Ack]], None],
    ) -> None:
        """`stream`: identity of the training stream."""
        self._settings = settings
        self._bus = bus
        self._clock = clock
        self._book = book
        self._files = files
        self._lease = lease
        self._newest = newest
        self._stream = stream
        self._progress = progress
        self._verdicts = verdicts
        self._acknowledge = acknowledge

    async def restore(self, node: NodeTraining, action: Restore) -> Sequence[Action]:
        """Have all stages hold the newest checkpoint."""
        newest = self._newest.of(node.node)
        weights = checkpoints.as_saved(newest)
        # First: a verdict that comes between the two must not be taken for one on what is served then.
        verdict = None if newest is None else await on_disk(partial(self._files.verdict_on, newest))
        if verdict is not None:
            self._verdicts.recall(node.node, verdict)
        served, rise = await self._serving(node.node, weights.version)
        message = RestoreWeights(
            fence=action.fence,
            weights=weights,
            serving=self._settings.serving,
            served=served,
            feeding=self._settings.feeding,
        )
        failure = await self._ask_to_restore(node.node, action, message)
        now_s = self._clock.now_s()
        return node.restored(
            action.fence,
            failure,
            now_s,
            served=message.served_version,
            rise=rise,
            is_judged=newest is None or verdict is not None,
        )

    async def _ask_to_restore(self, node: int, action: Restore, message: RestoreWeights) -> str:
        """Returns why not all stages have done it; empty: they have.

        Raises ConfigurationError when another trainer leads.
        """
        try:
            await self._lease.allow(action.fence)
        except BusError as error:
            return f"fence {action.fence} cannot be allowed: {error}"
        refusals = await ask_all(
            self._bus,
            RESTORE,
            message,
            node=node,
            num_stages=action.num_stages,
            timeout_s=RESTORE_TIMEOUT_S,
        )
        return "; ".join(f"stage {stage}: {reason}" for stage, reason in refusals.items())

    async def request_save(self, node: NodeTraining, action: RequestSave) -> Sequence[Action]:
        """Ask all stages to write their shards; they report when they have."""
        folder = self._files.temporary(node.node, action.version, action.fence)
        try:
            await on_disk(partial(self._files.begin, folder))
        except OSError as error:
            refusals = dict.fromkeys(range(action.num_stages), f"not asked: {error}")
        else:
            refusals = await ask_all(
                self._bus,
                SAVE,
                SaveWeights(fence=action.fence, version=action.version, folder=str(folder)),
                node=node.node,
                num_stages=action.num_stages,
                timeout_s=SAVE_TIMEOUT_S,
            )
        now_s = self._clock.now_s()
        return node.in_life(action.fence, lambda work: work.save_answered(action.version, refusals, now_s))

    async def write(self, node: NodeTraining, action: WriteCheckpoint) -> Sequence[Action]:
        """Make the shards of all stages a checkpoint."""
        folder = self._files.temporary(node.node, action.version, node.life.fence)
        manifest, learnt = self._manifest(node.node, action), self._book.learnt_by(node.node, action.version)
        failure = ""
        try:
            finish = partial(self._files.finish, folder, manifest, action.shards.values(), learnt)
            checkpoint = await on_disk(finish)
        except OSError as error:
            failure = str(error)
        else:
            await self._verdicts.write(node.node)
            self._newest.add(checkpoint)
            saved = self._book.saved_by(node.node, action.version)
            entry = checkpoint.manifest.lineage_entry
            self._acknowledge(self._book.make_durable(node.node, action.version, entry=entry))
            self._progress.publish_durable(saved, node.node, action.version)
        return node.checkpoint_written(action.version, failure, self._clock.now_s())

    async def prune(self, node: int) -> None:
        """Remove old checkpoints, and then the messages that none of those left would need again."""
        try:
            async with self._files.in_use:
                undecided = self._verdicts.undecided
                now_wall_s = self._clock.wall_s()
                await on_disk(partial(self._files.prune, node, now_wall_s=now_wall_s, undecided=undecided))
                watermark = await on_disk(self._files.oldest_watermark)
            await self._bus.purge_stream(TRAIN_STREAM.name, watermark)
        except (OSError, BusError) as error:
            log.warning("node %d: old checkpoints or messages stay: %s", node, error)

    def _manifest(self, node: int, action: WriteCheckpoint) -> Manifest:
        return manifest_of(
            self._book.ledger,
            node,
            action.version,
            num_stages=action.num_stages,
            model=self._settings.model,
            stream=self._stream,
            merge=self._settings.merging,
            settings=self._settings.as_text(OF_TRAINING) | _settings_of(action.shards.values()),
            may_serve=not self._settings.is_guarded,
            wall_s=self._clock.wall_s(),
        )

    async def _serving(self, node: int, version: int) -> tuple[SavedWeights | None, float]:
        """The checkpoint that a guard has approved, None if the node goes on from it; and its loss.

        The loss is given in multiples of the lowest loss.
        """
        if not self._settings.is_guarded:
            return None, 1.0
        async with self._files.in_use:
            serving = await on_disk(partial(self._files.serving, node))
        return served_instead(serving, version), serving.manifest.held_out_rise if serving else 1.0


def _settings_of(shards: Iterable[ShardSaved]) -> dict[str, str]:
    return {name: value for shard in shards for name, value in shard.settings.items()}
