"""A stage's part in a check: a few tokens go forward with the weights that train, whatever serves.

trainer --CHECK--> stage 0 --> ... --> last stage --CheckScored--> trainer, which compares
"""

import logging
from functools import partial

from services.stage_worker.context import WorkerContext
from services.stage_worker.pipeline.disciplines import WorkKind
from services.stage_worker.training.training import Training
from shared.bus.base import Incoming
from shared.messages.training import CheckForward, CheckScored, StageReport
from shared.subjects import CHECK, REPORT

log = logging.getLogger(__name__)


class Checking:
    """Goes by the training's fence and version; a check that fails harms nothing."""

    def __init__(self, context: WorkerContext, training: Training) -> None:
        self._settings = context.settings
        self._bus = context.bus
        self._executor = context.executor
        self._queue = context.queue
        self._ignored = context.ignored
        self._training = training

    async def subscribe(self) -> None:
        """Listen to the trainer, or to the stage before."""
        place = {"node": self._settings.node, "stage": self._settings.stage}
        await self._bus.subscribe(CHECK.at(**place), self._on_check)

    async def _on_check(self, incoming: Incoming[CheckForward]) -> None:
        self._queue.put(WorkKind.DEFERRABLE, partial(self._check, incoming.message))

    async def _check(self, check: CheckForward) -> None:
        training = self._training
        if (check.fence, check.version) != (training.work.fence, training.versions.version):
            self._ignored.is_other("a check", check.fence, training.work.fence)
            if check.hidden is not None:
                await self._executor.discard(check.hidden)
            await self._report(check, CheckScored(version=check.version))
            return
        try:
            scored = await self._executor.score(check.tokens, check.hidden)
        except Exception:
            log.exception("version %d could not be checked", check.version)
            await self._report(check, CheckScored(version=check.version))
            return
        if scored.hidden is None:
            event = CheckScored(version=check.version, logprobs=scored.logprobs, dtype=scored.dtype)
            await self._report(check, event)
            return
        passed_on = CheckForward(
            fence=check.fence, version=check.version, tokens=check.tokens, hidden=scored.hidden
        )
        place = CHECK.at(node=self._settings.node, stage=self._settings.stage + 1)
        await self._bus.publish(place, passed_on)

    async def _report(self, check: CheckForward, event: CheckScored) -> None:
        settings = self._settings
        report = StageReport(node=settings.node, stage=settings.stage, fence=check.fence, event=event)
        await self._bus.publish(REPORT.at(), report)
