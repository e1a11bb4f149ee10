"""Reports this stage's ops and their times to the scheduler."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from msgspec import structs

from services.stage_worker.compute.executor import SequenceChunk
from services.stage_worker.pipeline.device import HandedOp, Turns
from services.stage_worker.pipeline.sizes import work_of_iteration, work_of_microbatch
from shared.bus.base import Bus
from shared.clock import Clock
from shared.messages.events import OpEnded, OpKind, OpStarted, StageOp, StageProgress
from shared.messages.training import Microbatch
from shared.profiles.times import NO_WORK, Work
from shared.subjects import PROGRESS, PROGRESS_EVERY_S

MAX_LAUNCHED = 256
"""Iterations in flight are far fewer."""


class Progress:
    """Notes the start and end of every op of a stage; one task (`run`) reports them."""

    def __init__(self, *, node: int, stage: int, turns: Turns, bus: Bus, clock: Clock) -> None:
        self._node = node
        self._stage = stage
        self._turns = turns
        self._bus = bus
        self._clock = clock
        self._ended: list[tuple[OpEnded, float]] = []
        """(op, end) of what is not published yet; `ago_s` is set when it is."""
        self._happened = asyncio.Event()
        self._launched: asyncio.Queue[HandedOp] = asyncio.Queue(MAX_LAUNCHED)
        """Ops whose calls have returned, but which the device may still be doing."""

    @contextmanager
    def doing(self, op: StageOp | None) -> Iterator[HandedOp]:
        """Note the op around the executor's call, which gives `took`; the op may outlast the call.

        An op that raises is not reported, nor is None: work that nobody shall count on, as it goes where
        nothing else would.
        """
        handed = HandedOp(self._stage, op, self._clock.now_s())
        self._turns.handed.append(handed)
        self._happened.set()
        try:
            yield handed
        except BaseException:
            self._end(handed, is_published=False)
            raise
        if all(part.is_over() for part in handed.took):
            self._end(handed)
        else:
            self._launched.put_nowait(handed)

    @contextmanager
    def standing_aside(self, handed: HandedOp) -> Iterator[None]:
        """Note that another op runs between two slices of this one."""
        self._turns.stand_aside(handed, self._clock.now_s())
        self._happened.set()
        try:
            yield
        finally:
            self._turns.go_on(self._clock.now_s())
            self._happened.set()

    async def run(self) -> None:
        """Report what happens; runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._await_ends())
            group.create_task(self._publish())

    async def _await_ends(self) -> None:
        """Note the ends of ops that outlast their calls, in the order in which they were launched."""
        while True:
            handed = await self._launched.get()
            for part in handed.took:
                await asyncio.to_thread(part.wait_s)
            self._end(handed)

    def _end(self, handed: HandedOp, *, is_published: bool = True) -> None:
        now_s, took_s = self._clock.now_s(), [part.wait_s() for part in handed.took] if is_published else []
        if is_published and handed.op is not None:
            elapsed_s = sum(took_s) if took_s else now_s - handed.since_s - handed.given_way_s
            ended = OpEnded(op=handed.op, elapsed_s=elapsed_s, ago_s=0.0, given_way_s=handed.given_way_s)
            self._ended.append((ended, now_s))
        self._turns.end(handed, now_s)
        self._happened.set()

    async def _publish(self) -> None:
        """Report events at once, but not more often than every PROGRESS_EVERY_S."""
        publish_from_s = self._clock.now_s()
        while True:
            await self._happened.wait()
            if (early_s := publish_from_s - self._clock.now_s()) > 0:
                await asyncio.sleep(early_s)
            self._happened.clear()
            await self._bus.publish(PROGRESS.at(), self._message())
            publish_from_s = self._clock.now_s() + PROGRESS_EVERY_S

    def _message(self) -> StageProgress:
        now_s, turns = self._clock.now_s(), self._turns
        ended = tuple(structs.replace(each, ago_s=now_s - end_s) for each, end_s in self._ended)
        self._ended.clear()
        return StageProgress(
            node=self._node,
            stage=self._stage,
            ended=ended,
            running=self._started(turns.handed[0], now_s) if turns.handed else None,
            aside=self._started(turns.aside, now_s) if turns.aside else None,
        )

    def _started(self, handed: HandedOp, now_s: float) -> OpStarted | None:
        """None: it is of another stage, or nobody counts on it."""
        if handed.stage != self._stage or handed.op is None:
            return None
        given_way_s = handed.given_way_s
        if handed is self._turns.aside:
            given_way_s += now_s - self._turns.aside_since_s
        return OpStarted(op=handed.op, ago_s=now_s - handed.since_s, given_way_s=given_way_s)


def iteration_op(number: int, chunks: Sequence[SequenceChunk]) -> StageOp:
    """An iteration; it is named after the tasks whose prompt it completes."""
    completed = tuple(chunk.task_id for chunk in chunks if chunk.produces and chunk.index == chunk.num_given)
    return _op("iteration", completed, number, work_of_iteration(chunks))


def microbatch_op(kind: Literal["forward", "backward"], microbatch: Microbatch) -> StageOp:
    """A microbatch on its way through the stage."""
    return _op(kind, (microbatch.batch_id,), microbatch.index, work_of_microbatch(microbatch))


def step_op(batch_id: str) -> StageOp:
    """The optimizer's step for a batch."""
    return _op("step", (batch_id,), 0, NO_WORK)


def _op(kind: OpKind, task_ids: tuple[str, ...], index: int, work: Work) -> StageOp:
    return StageOp(
        kind=kind,
        task_ids=task_ids,
        index=index,
        num_tokens=work.num_tokens,
        num_pairs=work.num_pairs,
        num_sequences=work.num_sequences,
        num_context_tokens=work.num_context_tokens,
    )
