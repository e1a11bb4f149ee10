"""A stage's training under its trainer's fence: done in turn, ignored under another, reported if it fails."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from services.stage_worker.context import WorkerContext
from services.stage_worker.pipeline.device import HandedOp
from services.stage_worker.pipeline.disciplines import WorkKind
from shared import subjects
from shared.errors import BusError, CarrierError, RefusedError
from shared.messages.base import Done
from shared.messages.training import StageEvent, StageReport, TrainingFailed
from shared.messages.weights import AllowedFences
from shared.slices import NumSlices
from shared.tensors.ref import TensorRef

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Item:
    """Work for a batch, and the tensors that came with it."""

    fence: int
    batch_id: str
    tensors: Sequence[TensorRef]
    work: Callable[[], Awaitable[None]]


class FencedWork:
    """The way of all training through this stage's queue, and of its reports to the trainer."""

    def __init__(self, context: WorkerContext, num_slices: NumSlices) -> None:
        self.fence = 0
        """Set as soon as a restore is asked for that the trainer's lease allows."""
        self.has_begun = False
        """Whether any has been done since this was last set to False."""
        self._settings = context.settings
        self._bus = context.bus
        self._executor = context.executor
        self._queue = context.queue
        self._progress = context.progress
        self._num_slices = num_slices
        self._ignored = context.ignored

    def check_is(self, fence: int) -> None:
        """Check the fence. Raises RefusedError when it is not the present one."""
        if fence != self.fence:
            raise self._refusal(f"fence {fence} is not {self.fence}, which this stage follows", 409)

    async def follow(self, fence: int) -> None:
        """Follow this fence from now on, if the trainer's lease allows it; what is of an earlier one is over.

        Raises RefusedError: with 409 when it is not above the present one, with 403 when the lease does not
        allow it, with 503 when the lease cannot be read.
        """
        self._check_is_later(fence)
        try:
            lease = await self._bus.read_lease(subjects.TRAINER_LEASE)
            allowed = AllowedFences.unpack(lease.body) if lease and lease.body else None
        except BusError as error:
            raise self._refusal(f"whether fence {fence} is allowed cannot be read: {error}", 503) from error
        if allowed is None or not allowed.first <= fence <= allowed.last:
            raise self._refusal(f"no lease allows fence {fence}", 403)
        self._check_is_later(fence)  # another may have been followed meanwhile
        self.fence = fence

    def _check_is_later(self, fence: int) -> None:
        if fence <= self.fence:
            raise self._refusal(f"fence {fence} is over, this stage follows {self.fence}", 409)

    def _refusal(self, reason: str, code: int) -> RefusedError:
        self._ignored.note("a command of the trainer", reason)
        return RefusedError(reason, code=code)

    def enqueue(self, kind: WorkKind, item: Item, *, is_sliced: bool = False) -> None:
        """Have it done in its turn, if it is of the present fence, then too.

        `is_sliced`: it is an op that calls `give_way` between its slices, where there are any.
        """
        is_current = item.fence == self.fence
        work = partial(self._guarded if is_current else self._ignore, item)
        count = self._num_slices.of_step if kind is WorkKind.STEP else self._num_slices.of_pass
        self._queue.put(kind, work, gives_way=is_sliced and count > 1)

    async def give_way(self, handed: HandedOp) -> None:
        """Between two slices of an op: let an iteration go first, if the op must."""
        if self._queue.must_give_way:
            with self._progress.standing_aside(handed):
                await self._queue.give_way()

    async def done_in_turn(self, work: Callable[[], Awaitable[None]], within_s: float) -> Done:
        """Raises RefusedError when it is too late, or what `work` raises."""
        try:
            await self._queue.do_in_turn(work, within_s=within_s)
        except TimeoutError as error:
            raise RefusedError(f"not done within {within_s:g} s", code=504) from error
        return Done()

    async def failed(self, fence: int, batch_id: str, error: Exception) -> None:
        """Tell that what the batch needed cannot be done; the trainer restores the node."""
        await self.report(fence, _failure(batch_id, error))

    async def report(self, fence: int, event: StageEvent) -> None:
        """Report to the trainer, under the fence of the event: a restore may have begun another since."""
        report = StageReport(node=self._settings.node, stage=self._settings.stage, fence=fence, event=event)
        await self._bus.publish(subjects.REPORT.at(), report)

    async def _guarded(self, item: Item) -> None:
        """A batch that fails is reported, loudly, and the node is restored; serving goes on."""
        if item.fence != self.fence:  # a restore came while the item waited
            await self._ignore(item)
            return
        self.has_begun = True
        try:
            await item.work()
        except Exception as error:
            log.exception("training on %s failed", item.batch_id)
            await self.failed(item.fence, item.batch_id, error)

    async def _ignore(self, item: Item) -> None:
        """Drop an item of another fence; its tensors' slots in a peer's arena must come free again."""
        self._ignored.note(item.batch_id, f"of fence {item.fence}, and this stage follows {self.fence}")
        for tensor in item.tensors:
            await self._executor.discard(tensor)


def _failure(batch_id: str, error: Exception) -> TrainingFailed:
    """torch is not loaded here: its out-of-memory error is known by name."""
    names = {kind.__name__ for kind in type(error).__mro__}
    lacks_memory = isinstance(error, MemoryError) or "OutOfMemoryError" in names
    return TrainingFailed(
        batch_id=batch_id,
        reason=f"{type(error).__name__}: {error}",
        is_batch_at_fault=not (lacks_memory or isinstance(error, CarrierError)),
        lacks_memory=lacks_memory,
    )
