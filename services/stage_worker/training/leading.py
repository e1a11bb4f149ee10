"""A stage's training within its node's: stage 0 leads, the others tell it how far they are."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from services.stage_worker.context import WorkerContext
from services.stage_worker.node.train_schedule import Enter, Lead, TrainSchedule
from shared import subjects
from shared.bus.base import Incoming
from shared.messages.training import (
    GradientsReady,
    Microbatch,
    MicrobatchForward,
    StageEvent,
    StepAhead,
    StepDone,
    StepOrder,
    TrainedReport,
)
from shared.messages.weights import RestoreWeights
from shared.schedule import BY_DEFAULT, Feeding


class Leader(Protocol):
    """Hears what the stage has done; on stage 0 what follows from it is done at once."""

    async def subscribe(self) -> None: ...

    def begin(self, message: RestoreWeights) -> None:
        """The stage holds these weights, and has no training in progress."""
        ...

    def merged(self, version: int) -> None: ...

    async def left(self, microbatch: Microbatch) -> None:
        """A microbatch has run forward here."""
        ...

    async def came_back(self, microbatch: Microbatch) -> None:
        """A microbatch has run backward here."""
        ...

    async def hear(self, fence: int, event: GradientsReady | StepDone) -> None: ...


class Following:
    """The leader as seen from another stage."""

    def __init__(self, context: WorkerContext) -> None:
        self._settings = context.settings
        self._bus = context.bus

    async def subscribe(self) -> None:
        """Nothing comes from the trainer."""

    def begin(self, message: RestoreWeights) -> None:
        """Stage 0 hears of it itself."""

    def merged(self, version: int) -> None:
        """Stage 0 hears of it itself."""

    async def left(self, microbatch: Microbatch) -> None:
        """Nothing to do: stage 0 counts what leaves it."""

    async def came_back(self, microbatch: Microbatch) -> None:
        """Nothing to do: stage 0 counts what comes back to it."""

    async def hear(self, fence: int, event: GradientsReady | StepDone) -> None:
        report = TrainedReport(stage=self._settings.stage, fence=fence, event=event)
        await self._bus.publish(subjects.TRAINED.at(node=self._settings.node), report)


class Leading:
    """Carries out what the node's schedule decides, under one fence (stage 0)."""

    def __init__(
        self,
        context: WorkerContext,
        *,
        enter: Callable[[MicrobatchForward], None],
        step: Callable[[StepOrder], None],
        report: Callable[[int, StageEvent], Awaitable[None]],
    ) -> None:
        """`enter`, `step`: have it done on this stage in its turn. `report`: tell the trainer."""
        self._settings = context.settings
        self._bus = context.bus
        self._clock = context.clock
        self._ignored = context.ignored
        self._enter = enter
        self._step = step
        self._report = report
        self._fence = 0
        self._schedule = self._scheduled(BY_DEFAULT, 0)

    async def subscribe(self) -> None:
        """Listen to the trainer, and to the other stages."""
        node = self._settings.node
        await self._bus.subscribe(subjects.FORWARD.at(node=node, stage=0), self._on_feed)
        await self._bus.subscribe(subjects.STEP_AHEAD.at(node=node), self._on_step_ahead)
        await self._bus.subscribe(subjects.STEP.at(node=node, stage=0), self._on_order)
        await self._bus.subscribe(subjects.TRAINED.at(node=node), self._on_trained)

    def begin(self, message: RestoreWeights) -> None:
        self._fence = message.fence
        self._schedule = self._scheduled(message.feeding, message.weights.version)

    def merged(self, version: int) -> None:
        self._schedule.merged(version)

    async def left(self, microbatch: Microbatch) -> None:
        if microbatch.fence == self._fence:
            now_s = self._clock.now_s()
            await self._carry_out(self._schedule.left(microbatch.batch_id, microbatch.index, now_s))

    async def came_back(self, microbatch: Microbatch) -> None:
        if microbatch.fence == self._fence:
            await self._carry_out(self._schedule.came_back(microbatch.batch_id, microbatch.index))

    async def hear(self, fence: int, event: GradientsReady | StepDone) -> None:
        await self._heard(0, fence, event)

    def _scheduled(self, feeding: Feeding, version: int) -> TrainSchedule:
        settings = self._settings
        return TrainSchedule(
            settings.num_stages, feeding=feeding, stashing=settings.stashing, version=version
        )

    async def _on_feed(self, incoming: Incoming[MicrobatchForward]) -> None:
        if self._is_followed("a microbatch", incoming.message.microbatch.fence):
            await self._carry_out(self._schedule.feed(incoming.message))

    async def _on_step_ahead(self, incoming: Incoming[StepAhead]) -> None:
        if self._is_followed("a step ahead", incoming.message.fence):
            await self._carry_out(self._schedule.step_ahead(incoming.message))

    async def _on_order(self, incoming: Incoming[StepOrder]) -> None:
        if self._is_followed("a step", incoming.message.fence):
            await self._carry_out(self._schedule.order(incoming.message))

    async def _on_trained(self, incoming: Incoming[TrainedReport]) -> None:
        report = incoming.message
        await self._heard(report.stage, report.fence, report.event)

    async def _heard(self, stage: int, fence: int, event: GradientsReady | StepDone) -> None:
        if not self._is_followed(f"a report of stage {stage}", fence):
            return
        if isinstance(event, StepDone):
            await self._carry_out(self._schedule.step_done(stage, event))
        else:
            await self._carry_out(self._schedule.gradients_ready(stage, event))

    def _is_followed(self, what: str, fence: int) -> bool:
        return not self._ignored.is_other(what, fence, self._fence)

    async def _carry_out(self, leads: Iterable[Lead]) -> None:
        for lead in leads:
            match lead:
                case Enter(forward=forward):
                    self._enter(forward)
                case StepOrder():
                    await self._order(lead)
                case _:
                    await self._report(self._fence, lead)

    async def _order(self, order: StepOrder) -> None:
        for stage in range(1, self._settings.num_stages):
            await self._bus.publish(subjects.STEP.at(node=self._settings.node, stage=stage), order)
        self._step(order)
