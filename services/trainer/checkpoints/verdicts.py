"""The guard's verdicts on versions, and the versions that it is about to judge."""

import asyncio
import logging
from collections import defaultdict, deque
from dataclasses import replace
from functools import partial

from services.trainer.checkpoints.files import CheckpointFiles
from services.trainer.checkpoints.manifests import Verdict
from services.trainer.publication.evaluator import Evaluator
from shared.clock import Clock
from shared.disk import on_disk
from shared.messages.weights import JudgedVersion

MAX_SHOWN = 8
"""Verdicts on each node that are remembered for those who ask."""
WITHHELD_BEFORE = "a guard has withheld it before"

log = logging.getLogger(__name__)


class Verdicts:
    """The last verdict on each node, until the node is rolled back or begins anew."""

    def __init__(
        self,
        files: CheckpointFiles,
        *,
        evaluator: Evaluator,
        clock: Clock,
        shares_weights: bool,
        tasks: asyncio.TaskGroup,
    ) -> None:
        """`shares_weights`: one node's verdict is about the checkpoints of all."""
        self._files = files
        self._evaluator = evaluator
        self._clock = clock
        self._shares_weights = shares_weights
        self._tasks = tasks
        self._last: dict[int, Verdict] = {}
        self._shown: defaultdict[int, deque[JudgedVersion]] = defaultdict(lambda: deque(maxlen=MAX_SHOWN))

    @property
    def undecided(self) -> set[int]:
        """Versions that may serve, or may later, and whose manifests perhaps do not say so yet."""
        approved = {verdict.version for verdict in self._last.values() if verdict.may_serve}
        return self._evaluator.versions | approved

    def add(self, node: int, verdict: Verdict) -> None:
        """Remember the verdict, which is given now, and write it down if its version has a checkpoint.

        One without losses is not shown: nothing was judged.
        """
        verdict = replace(verdict, judged_wall_s=self._clock.wall_s())
        self._last[node] = verdict
        if verdict.losses.are_known:
            self._shown[node].append(_as_shown(verdict))
        self._tasks.create_task(self._write(node, verdict))

    def recall(self, node: int, verdict: Verdict) -> None:
        """Show a verdict that an earlier life of the trainer has written down."""
        if all(shown.version != verdict.version for shown in self._shown[node]):
            self._shown[node].append(_as_shown(verdict))

    def of(self, node: int) -> tuple[JudgedVersion, ...]:
        """The newest verdicts on the node's versions, oldest first; those before a rollback, too."""
        return tuple(self._shown[node])

    async def write(self, node: int) -> None:
        """Write down the verdict on the node's new checkpoint, which may have come before it."""
        for number, verdict in list(self._last.items()):
            if self._shares_weights or number == node:
                await self._write(number, verdict)

    def forget(self, node: int) -> None:
        """Forget a node that begins anew: the numbers of its newer versions come again with other weights."""
        self._evaluator.drop(node)
        self._last.pop(node, None)

    async def _write(self, node: int, verdict: Verdict) -> None:
        try:
            async with self._files.in_use:
                await on_disk(partial(self._files.note_verdict, node, verdict))
        except OSError as error:
            log.warning("node %d: the verdict on version %d is not saved: %s", node, verdict.version, error)


def _as_shown(verdict: Verdict) -> JudgedVersion:
    return JudgedVersion(
        version=verdict.version,
        judged_wall_s=verdict.judged_wall_s,
        training_loss=verdict.training_loss,
        held_out_loss=verdict.losses.held_out,
        samples_loss=verdict.losses.samples,
        why_withheld="" if verdict.may_serve else verdict.why_withheld or WITHHELD_BEFORE,
    )
