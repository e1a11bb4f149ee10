"""Rollbacks: nodes go back to an older checkpoint for good, when none of them trains any more."""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

from services.trainer.checkpoints import rollback_files
from services.trainer.checkpoints.files import CheckpointFiles
from services.trainer.checkpoints.manifests import lineage_of, rolled_back
from services.trainer.checkpoints.newest import NewestCheckpoints
from services.trainer.ledger.pending_batches import Ack, BatchBook
from services.trainer.ledger.progress import Progress
from services.trainer.nodes.decisions import Action
from services.trainer.nodes.node_training import NodeTraining
from shared.checkpoints import Checkpoint
from shared.disk import on_disk
from shared.errors import RefusedError

log = logging.getLogger(__name__)


RunAll = Callable[[Iterable[tuple[NodeTraining, Sequence[Action]]]], None]


class _Rollback:
    """An order to go back, and its answer."""

    def __init__(self, nodes: Sequence[NodeTraining], target: Checkpoint, run_all: RunAll) -> None:
        self.nodes = nodes
        self.run_all = run_all
        self.target = target
        self.unclosed = {node.node for node in nodes}
        """Until none is, the disk stays as it is."""
        self.num_discarded: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def answer(self, num_discarded: int, failure: str) -> None:
        """Answer whoever still waits for it."""
        if self.num_discarded.done():
            return
        if failure:
            self.num_discarded.set_exception(RefusedError(f"nothing was rolled back: {failure}"))
        else:
            self.num_discarded.set_result(num_discarded)


class Rollbacks:
    """Runs rollbacks. A node takes part in one at a time; the caller of `order` ensures it."""

    def __init__(
        self,
        files: CheckpointFiles,
        *,
        book: BatchBook,
        newest: NewestCheckpoints,
        progress: Progress,
        acknowledge: Callable[[Iterable[Ack]], None],
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._files = files
        self._book = book
        self._newest = newest
        self._progress = progress
        self._acknowledge = acknowledge
        self._tasks = tasks
        self._ordered: dict[int, _Rollback] = {}
        """Rollbacks by node that is not closed yet."""

    async def order(self, nodes: Sequence[NodeTraining], target: Checkpoint, run_all: RunAll) -> int:
        """Have one node, or all that share their weights, go back to `target`; returns how many batches are
        discarded. `run_all`: carries out what they decide.

        Raises RefusedError when the disk refuses: then they are as they were.
        """
        decided = [(node, node.roll_back(target.manifest.version)) for node in nodes]
        rollback = _Rollback(nodes, target, run_all)
        self._ordered |= {node.node: rollback for node in nodes}
        run_all(decided)
        return await rollback.num_discarded

    def note_closed(self, node: int) -> None:
        """Note that the node has stopped training, and that nothing of it is being saved."""
        rollback = self._ordered.pop(node)
        rollback.unclosed.remove(node)
        if not rollback.unclosed:
            self._tasks.create_task(self._carry_out(rollback))

    async def _carry_out(self, rollback: _Rollback) -> None:
        manifest, ledger, merge = rollback.target.manifest, self._book.ledger, self._files.merge
        # Where weights are shared, nodes that do not run now would else bring newer ones back.
        numbers = {manifest.node} if merge == "none" else {*ledger.lineages, manifest.node}
        num_discarded = ledger.num_contained(numbers) - manifest.version
        after = ledger.roll_back(numbers, lineage_of(manifest))
        failure = ""
        try:
            async with self._files.in_use:
                intended = rolled_back(manifest, after, merge=merge)
                await on_disk(partial(rollback_files.intend, self._files.root, intended))
                await on_disk(partial(rollback_files.complete, self._files.root, manifest.node))
        except OSError as error:
            failure = str(error)
        else:
            self._note_rolled_back(numbers, rollback.target)
        rollback.run_all([(node, node.rolled_back(failure)) for node in rollback.nodes])
        rollback.answer(num_discarded, failure)

    def _note_rolled_back(self, numbers: Collection[int], target: Checkpoint) -> None:
        """Note that these nodes are rolled back on the disk."""
        self._newest.roll_back(numbers, target)
        before = self._book.ledger.discarded_ids
        self._acknowledge(self._book.roll_back(numbers, lineage_of(target.manifest)))
        after = self._book.ledger.discarded_ids
        self._progress.publish_discarded([batch_id for batch_id in after if batch_id not in before])
        log.warning("nodes %s go back to version %d", sorted(numbers), target.manifest.version)
