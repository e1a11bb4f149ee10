"""Writes this stage's share of the checkpoints that the trainer wants."""

import asyncio
import logging
from pathlib import Path
from typing import Any

from services.stage_worker.compute.executor import ModelFacts
from services.stage_worker.context import WorkerContext, check_in_run
from services.stage_worker.pipeline.disciplines import WorkKind
from services.stage_worker.settings import OF_TRAINING
from services.stage_worker.training.fenced_work import FencedWork
from services.stage_worker.training.stage_versions import StageVersions
from shared import subjects
from shared.bus.base import Incoming
from shared.errors import RefusedError
from shared.messages.base import Done
from shared.messages.training import SaveFailed, ShardSaved
from shared.messages.weights import SaveWeights
from shared.task_groups import start_unless_ending

log = logging.getLogger(__name__)


class ShardSaves:
    """A snapshot is taken when the stage holds the version, and written beside whatever comes next."""

    def __init__(
        self,
        context: WorkerContext,
        facts: ModelFacts,
        *,
        work: FencedWork,
        versions: StageVersions,
        group: asyncio.TaskGroup,
    ) -> None:
        self._settings = context.settings
        self._bus = context.bus
        self._executor = context.executor
        self._queue = context.queue
        self._work = work
        self._versions = versions
        self._group = group
        self._chosen_settings = dict(facts.settings)
        self._wanted: dict[int, SaveWeights] = {}
        """The checkpoints that are to be written, by their version."""

    async def subscribe(self) -> None:
        """Listen to the trainer."""
        place = {"node": self._settings.node, "stage": self._settings.stage}
        await self._bus.respond(subjects.SAVE.at(**place), self._on_save)

    def forget(self) -> None:
        """Write none of those that have not begun."""
        self._wanted.clear()

    async def begin_if_due(self) -> None:
        """Take a snapshot, if the present version is to be written."""
        present = self._versions.version
        for version in sorted(version for version in self._wanted if version <= present):
            save = self._wanted.pop(version)
            if version < present:
                await self._failed(save, f"the stage has gone on to version {present}")
            else:
                start_unless_ending(self._group, self._write(await self._executor.snapshot(), save))

    async def _on_save(self, incoming: Incoming[SaveWeights]) -> Done:
        message, present = incoming.message, self._versions.version
        check_in_run(message.folder, self._settings.checkpoint_dir)
        self._work.check_is(message.fence)
        if message.version < present:
            raise RefusedError(f"version {message.version} is gone, this stage holds {present}", code=409)
        # One is asked for at a time: a later version was to be made by a batch that has been skipped since.
        earlier = {version: save for version, save in self._wanted.items() if version < message.version}
        self._wanted = earlier | {message.version: message}
        self._queue.put(WorkKind.CONTROL, self.begin_if_due)
        return Done()

    async def _write(self, snapshot: Any, save: SaveWeights) -> None:
        try:
            shard = await self._executor.write(snapshot, Path(save.folder))
        except OSError as error:
            await self._failed(save, str(error))
            return
        saved = ShardSaved(
            version=save.version,
            sha256_by_file=shard.sha256_by_file,
            file_by_tensor=shard.file_by_tensor,
            size_bytes=shard.size_bytes,
            written_bytes=shard.written_bytes,
            adapter=shard.adapter,
            settings=self._settings.as_text(OF_TRAINING) | self._chosen_settings,
        )
        await self._work.report(save.fence, saved)

    async def _failed(self, save: SaveWeights, reason: str) -> None:
        log.error("checkpoint of version %d not written: %s", save.version, reason)
        await self._work.report(save.fence, SaveFailed(version=save.version, reason=reason))
