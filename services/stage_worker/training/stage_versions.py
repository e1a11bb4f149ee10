"""The weights versions that a stage holds: the present one, and those that are kept for serving."""

from collections.abc import Callable
from functools import partial

from services.stage_worker.compute.executor import ModelFacts
from services.stage_worker.context import WorkerContext
from services.stage_worker.pipeline.disciplines import WorkKind
from services.stage_worker.training.fenced_work import FencedWork
from shared import subjects
from shared.bus.base import Incoming
from shared.errors import RefusedError
from shared.messages.base import Done
from shared.messages.weights import KeepVersion, ReleaseVersion, RestoreWeights, SavedWeights

KEEP_DEADLINE_S = 60.0


class StageVersions:
    """Loads, keeps and releases versions as the trainer says."""

    def __init__(
        self,
        context: WorkerContext,
        facts: ModelFacts,
        *,
        work: FencedWork,
        note_version: Callable[[int], None],
    ) -> None:
        self.origin = facts.weights
        """The weights that were loaded last: the present ones are these, or descend from them."""
        self.version = facts.weights.version
        self._settings = context.settings
        self._bus = context.bus
        self._executor = context.executor
        self._queue = context.queue
        self._ignored = context.ignored
        self._work = work
        self._note_version = note_version
        self._kept: dict[int, SavedWeights | None] = {}
        """Versions that the executor keeps for serving: what each was loaded as; None: steps have made it."""
        note_version(self.version)

    async def subscribe(self) -> None:
        """Listen to the trainer."""
        place = {"node": self._settings.node, "stage": self._settings.stage}
        await self._bus.respond(subjects.KEEP.at(**place), self._on_keep)
        await self._bus.subscribe(subjects.RELEASE.at(**place), self._on_release)

    def reached(self, version: int) -> None:
        """Note that the present weights are of that version now."""
        self.version = version
        self._note_version(version)

    async def keep(self) -> bool:
        """Keep the present version; returns whether nothing else was kept under its number."""
        self._kept[self.version] = None if self._work.has_begun else self.origin
        return await self._executor.keep()

    async def restore(self, message: RestoreWeights) -> bool:
        """Hold these weights, and keep those that serve.

        Returns whether what serves now is what was kept under its number.
        """
        served, is_same = message.served, True
        stays = None if message.serving == "newest" else message.served_version
        for version in self._kept.keys() - {stays}:
            await self._release(version)
        # What steps have made under that number is something else if the stage was away during a rollback.
        if served is not None and self._kept.get(served.version) != served:
            await self._load(served)
            is_same = await self.keep()
        await self._load(message.weights)
        if message.serving != "newest" and served is None:
            is_same = await self.keep()
        return is_same

    async def _load(self, weights: SavedWeights) -> None:
        """Go on from these weights, which the stage may hold as they were loaded."""
        if self._work.has_begun or self.origin != weights:
            await self._executor.restore(weights.checkpoint, weights.version)
        self._work.has_begun = False
        self.origin = weights
        self.reached(weights.version)

    async def _on_keep(self, incoming: Incoming[KeepVersion]) -> Done:
        message = incoming.message
        self._work.check_is(message.fence)
        return await self._work.done_in_turn(partial(self._keep_if_present, message), KEEP_DEADLINE_S)

    async def _keep_if_present(self, message: KeepVersion) -> None:
        self._work.check_is(message.fence)
        if message.version != self.version:
            raise RefusedError(f"this stage is at version {self.version}, not {message.version}", code=409)
        await self.keep()

    async def _on_release(self, incoming: Incoming[ReleaseVersion]) -> None:
        message = incoming.message
        if not self._ignored.is_other("a release", message.fence, self._work.fence):
            self._queue.put(WorkKind.CONTROL, partial(self._release, message.version))

    async def _release(self, version: int) -> None:
        if version in self._kept:
            del self._kept[version]
            await self._executor.release(version)
