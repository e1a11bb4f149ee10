"""The edge of the scheduler: messages in, decisions, messages out."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace

from msgspec import structs
from opentelemetry.trace import Span, use_span

from services.scheduler.costs import Costs
from services.scheduler.events import (
    Event,
    HeartbeatSeen,
    ListenedUntil,
    PlacedTask,
    ProfileRead,
    RequestsLate,
    StageLeft,
    StageProgressed,
    TaskArrived,
    TaskAssigned,
    TaskLeftLine,
    TaskQueued,
    TasksEnded,
    TimePassed,
)
from services.scheduler.objectives import DEFAULT_OBJECTIVES, MeanPrompt, Objectives
from services.scheduler.policies.base import TOO_MUCH_LOAD, Arrival, Place, Policy, Refuse, Task, Wait
from services.scheduler.state import MAX_REMEMBERED, OVERDUE_SLACK_S, ClusterState
from services.scheduler.statistics import MeanError
from services.scheduler.tasks import shape_of
from shared.bus.base import Incoming
from shared.clock import on_time
from shared.errors import ConfigurationError, RefusedError
from shared.lifecycle import World
from shared.messages.cluster import (
    ClusterStatus,
    ForecastError,
    Heartbeat,
    StageStopped,
    StatusRequest,
    TaskKind,
)
from shared.messages.events import StageProgress
from shared.messages.inference import DEFERRED, InferenceTask, Placed, TaskEnded, TaskFailed
from shared.messages.training import TrainingTask
from shared.schedule import BY_DEFAULT, Feeding
from shared.subjects import (
    ASSIGN,
    ENDED,
    FAILED,
    HEARTBEAT,
    HEARTBEAT_S,
    PLACE,
    PROGRESS,
    STATUS,
    STOPPED,
    SUBMIT,
)
from shared.telemetry import traceparent_of

CHECK_S = HEARTBEAT_S / 2
"""How often silence is looked for: a lost node is noticed at most this much late."""
HOLD_S: Mapping[TaskKind, float] = {"inference": 8.0, "training": 3.0}
"""How long a task that must wait is held before its asker is told to ask again: less than the asker waits."""
MAX_HELD = MAX_REMEMBERED
"""Tasks of a kind that are held at once; those that come then wait unread."""
SHORTEST_WAIT_S = 0.001
QUEUE = "scheduler"

log = logging.getLogger(__name__)


class Scheduler:
    """Places every task on a node, and tells gateways of tasks that died with their node.

    Requests run concurrently: nothing may wait between a policy's look at the state and the
    TaskAssigned that follows from it.
    """

    def __init__(
        self,
        world: World,
        policy: Policy,
        *,
        costs: Costs,
        costs_of: Callable[[str], Costs] | None = None,
        objectives: Objectives = DEFAULT_OBJECTIVES,
        mean_prompt: MeanPrompt | None = None,
        feeding: Feeding = BY_DEFAULT,
    ) -> None:
        """See `ClusterState` for what follows `policy`.

        `costs_of`: reads the costs of a node's own profile, or raises ConfigurationError; None: all nodes
        start from `costs`.
        """
        self._costs = costs
        self._costs_of = costs_of
        self._bus = world.bus
        self._clock = world.clock
        self._telemetry = world.telemetry
        self._health = world.health
        self._policy = policy
        self._turns = _Turns()
        self._num_refused = 0
        self._state = ClusterState(
            costs=costs, objectives=objectives, mean_prompt=mean_prompt, feeding=feeding
        )

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._bus.subscribe(HEARTBEAT.at(), self._on_heartbeat)
        await self._bus.subscribe(STOPPED.at(), self._on_stopped)
        await self._bus.subscribe(ENDED.at(), self._on_ended)
        await self._bus.subscribe(PROGRESS.at(), self._on_progress)
        await self._bus.respond(SUBMIT.at(), self._submit, queue=QUEUE, max_running=MAX_HELD)
        await self._bus.respond(PLACE.at(), self._place, queue=QUEUE, max_running=MAX_HELD)
        await self._bus.respond(STATUS.at(), self._status, queue=QUEUE)
        self._health.begin("tasks are placed")
        async for _ in on_time(CHECK_S, at_most_late_s=HEARTBEAT_S, clock=self._clock):
            await self._pass_time()
            await self._apply(ListenedUntil(self._clock.now_s()))

    async def _on_heartbeat(self, incoming: Incoming[Heartbeat]) -> None:
        await self._read_profile(incoming.message)
        await self._apply(HeartbeatSeen(incoming.message, self._clock.now_s()))

    async def _read_profile(self, heartbeat: Heartbeat) -> None:
        """Read the node's own profile, once; one that cannot be read is no reason to leave the node out."""
        profile = heartbeat.profile
        if self._costs_of is None or self._state.knows_profile(profile):
            return
        try:
            costs = await asyncio.to_thread(self._costs_of, profile)
        except ConfigurationError as error:
            log.warning("node %d starts from the scheduler's own costs: %s", heartbeat.node, error)
            costs = self._costs
        await self._apply(ProfileRead(profile, costs))

    async def _on_stopped(self, incoming: Incoming[StageStopped]) -> None:
        await self._apply(StageLeft(incoming.message))

    async def _on_ended(self, incoming: Incoming[TaskEnded]) -> None:
        await self._apply(TasksEnded(incoming.message.task_ids, self._clock.now_s()))

    async def _on_progress(self, incoming: Incoming[StageProgress]) -> None:
        await self._apply(StageProgressed(incoming.message, self._clock.now_s()))

    async def _submit(self, incoming: Incoming[InferenceTask]) -> Placed:
        task = incoming.message
        with self._span(incoming) as span:
            placed, is_new = await self._decide(task, span)
            if is_new:
                shape = self._state.shape_of(task.task_id)
                task = structs.replace(task, pace=shape.pace)
                await self._bus.publish(ASSIGN.at(node=placed.node), task, traceparent=traceparent_of(span))
        return placed

    async def _place(self, incoming: Incoming[TrainingTask]) -> Placed:
        with self._span(incoming) as span:
            placed, _ = await self._decide(incoming.message, span)
        return placed

    async def _status(self, incoming: Incoming[StatusRequest]) -> ClusterStatus:
        await self._pass_time()
        state = self._state
        return ClusterStatus(
            policy=self._policy.name,
            nodes=state.status(),
            forward_error=_told(state.accuracy.forward_error),
            response_error=_told(state.accuracy.response_error),
            slo_s=state.slo_s,
            tbt_s=state.objectives.tbt_s,
            num_in_time=state.accuracy.num_in_time,
            num_late=state.accuracy.num_late,
            num_refused=self._num_refused,
            num_in_line=len(state.waiting_line),
        )

    async def _decide(self, task: Task, span: Span) -> tuple[Placed, bool]:
        """Hold the task until it has a node; False: it had one before.

        Raises RefusedError when it gets none, or none within HOLD_S.
        """
        if isinstance(task, InferenceTask) and not task.prompt:
            raise RefusedError("the prompt is empty", code=400)
        asked_s = self._clock.now_s()
        kind: TaskKind = "inference" if isinstance(task, InferenceTask) else "training"
        waited_s = task.waited_s if isinstance(task, InferenceTask) else 0.0
        shape, priority = shape_of(task), _priority_of(task)
        await self._apply(TaskArrived(task.task_id, kind, shape, asked_s, priority, waited_s))
        try:
            return await self._hold(task, kind, asked_s, span)
        finally:
            await self._apply(TaskLeftLine(task.task_id))

    async def _hold(self, task: Task, kind: TaskKind, asked_s: float, span: Span) -> tuple[Placed, bool]:
        give_up_s = asked_s + HOLD_S[kind]
        while True:
            await self._pass_time()
            if already := self._state.placed(task.task_id):
                return _answer(already), False  # it must not run twice
            now_s = self._clock.now_s()
            arrived_s = self._state.arrived_s(task.task_id) or asked_s
            match self._policy.choose(self._state, Arrival(task, arrived_s), now_s):
                case Place() as place:
                    placed = self._placed(task, place, arrived_s, span)
                    await self._apply(TaskAssigned(placed, now_s))
                    return _answer(placed), True
                case Refuse(code, reason, retry_after_s):
                    if code == TOO_MUCH_LOAD:
                        self._num_refused += 1
                        await self._apply(RequestsLate(now_s))
                    raise RefusedError(reason, code=code, retry_after_s=retry_after_s)
                case Wait(until_s, reason, in_line):
                    if now_s >= give_up_s:
                        raise RefusedError(f"{DEFERRED}: {reason}", code=503)
                    if in_line and await self._goes_ahead(task, arrived_s, now_s):
                        continue  # the policy looked at a line that another one was the first of
                    wait_s = max(SHORTEST_WAIT_S, min(until_s, give_up_s) - now_s)
                    await self._turns.wait(task.task_id, wait_s)

    async def _goes_ahead(self, task: Task, arrived_s: float, now_s: float) -> bool:
        """Let it stand in line; True: before another one, which was the first until now."""
        line = self._state.waiting_line
        stood_first = line.first
        await self._apply(RequestsLate(now_s))
        await self._apply(TaskQueued(task.task_id, _priority_of(task), arrived_s))
        return line.first == task.task_id and stood_first not in (None, task.task_id)

    def _placed(self, task: Task, place: Place, arrived_s: float, span: Span) -> PlacedTask:
        span.set_attribute("lemix.node", place.node)
        placed = PlacedTask(
            task_id=task.task_id,
            kind="training",
            node=place.node,
            traceparent=traceparent_of(span),
            shape=replace(
                shape_of(task),
                cached_tokens=place.cached_tokens,
                pace=place.pace,
            ),
            beginnings=place.beginnings,
            arrived_s=arrived_s,
            forecast=place.forecast,
            due_s=place.due_s,
            offload=place.offload,
        )
        if isinstance(task, TrainingTask):
            return placed
        overdue_s = self._clock.now_s() + task.timeout_s + OVERDUE_SLACK_S
        return replace(
            placed,
            kind="inference",
            gateway=task.gateway,
            overdue_s=overdue_s,
            ttft_s=task.objective.ttft_s or self._state.ttft_slo_s(len(task.prompt)),
            tbt_s=task.objective.tbt_s or self._state.objectives.tbt_s,
        )

    def _span(
        self, incoming: Incoming[InferenceTask] | Incoming[TrainingTask]
    ) -> AbstractContextManager[Span]:
        attributes = {"lemix.task_id": incoming.message.task_id, "lemix.policy": self._policy.name}
        span = self._telemetry.span(
            "scheduler.place", traceparent=incoming.traceparent, attributes=attributes
        )
        return use_span(span, end_on_exit=True)

    async def _pass_time(self) -> None:
        await self._apply(TimePassed(self._clock.now_s()))

    async def _apply(self, event: Event) -> None:
        """Change the state, then tell the gateways of the tasks that it cost."""
        lost_tasks = self._state.apply(event)
        self._turns.called(self._state.waiting_line.first)
        for lost in lost_tasks:
            failed = TaskFailed(task_id=lost.task.task_id, code=503, reason=lost.reason)
            await self._bus.publish(
                FAILED.at(gateway=lost.task.gateway), failed, traceparent=lost.task.traceparent
            )


def _answer(placed: PlacedTask) -> Placed:
    return Placed(node=placed.node, offload=placed.offload, ttft_s=placed.ttft_s, tbt_s=placed.tbt_s)


def _priority_of(task: Task) -> int:
    return task.objective.priority if isinstance(task, InferenceTask) else 0


class _Turns:
    """Wakes the task that has become the first of the waiting line."""

    def __init__(self) -> None:
        self._first: str | None = None
        self._waiting: dict[str, asyncio.Event] = {}

    def called(self, first: str | None) -> None:
        """Note whose turn it is."""
        if first != self._first and first in self._waiting:
            self._waiting[first].set()
        self._first = first

    async def wait(self, task_id: str, wait_s: float) -> None:
        """Return when it becomes the task's turn, at the latest after `wait_s`."""
        turn = self._waiting[task_id] = asyncio.Event()
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(turn.wait(), wait_s)
        finally:
            if self._waiting.get(task_id) is turn:
                del self._waiting[task_id]


def _told(error: MeanError) -> ForecastError:
    return ForecastError(mean=error.mean, count=error.count)
