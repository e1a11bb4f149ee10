"""The edge of the scheduler: messages in, decision, messages out."""

import asyncio
from contextlib import AbstractContextManager

from opentelemetry.trace import Span, use_span

from services.scheduler.policies.base import Policy, Task
from services.scheduler.state import (
    OVERDUE_SLACK_S,
    ClusterState,
    Event,
    HeartbeatSeen,
    PlacedTask,
    StageLeft,
    TaskAssigned,
    TasksEnded,
    TimePassed,
)
from shared.bus.base import Incoming
from shared.errors import RefusedError
from shared.lifecycle import World
from shared.messages.cluster import ClusterStatus, Heartbeat, StageStopped, StatusRequest
from shared.messages.inference import InferenceTask, Placed, TaskEnded, TaskFailed
from shared.messages.training import TrainingTask
from shared.subjects import ASSIGN, ENDED, FAILED, HEARTBEAT, HEARTBEAT_S, PLACE, STATUS, STOPPED, SUBMIT
from shared.telemetry import traceparent_of

CHECK_S = HEARTBEAT_S / 2
"""How often silence is looked for: a lost node is noticed at most this much late."""
QUEUE = "scheduler"


class Scheduler:
    """Places every task on a node, and tells gateways of tasks that died with theirs.

    Requests run concurrently: nothing may wait between a policy's look at the state and the
    TaskAssigned that follows from it.
    """

    def __init__(self, world: World, policy: Policy) -> None:
        self._bus = world.bus
        self._clock = world.clock
        self._telemetry = world.telemetry
        self._policy = policy
        self._state = ClusterState()

    async def run(self) -> None:
        """Serve for ever."""
        await self._bus.subscribe(HEARTBEAT.at(), self._on_heartbeat)
        await self._bus.subscribe(STOPPED.at(), self._on_stopped)
        await self._bus.subscribe(ENDED.at(), self._on_ended)
        await self._bus.respond(SUBMIT.at(), self._submit, queue=QUEUE)
        await self._bus.respond(PLACE.at(), self._place, queue=QUEUE)
        await self._bus.respond(STATUS.at(), self._status, queue=QUEUE)
        while True:
            await asyncio.sleep(CHECK_S)
            await self._pass_time()

    async def _on_heartbeat(self, incoming: Incoming[Heartbeat]) -> None:
        await self._apply(HeartbeatSeen(incoming.message, self._clock.now_s()))

    async def _on_stopped(self, incoming: Incoming[StageStopped]) -> None:
        await self._apply(StageLeft(incoming.message))

    async def _on_ended(self, incoming: Incoming[TaskEnded]) -> None:
        await self._apply(TasksEnded(incoming.message.task_ids))

    async def _submit(self, incoming: Incoming[InferenceTask]) -> Placed:
        task = incoming.message
        await self._pass_time()
        if already := self._state.placed(task.task_id):
            return Placed(node=already.node)  # delivered twice: it must not run twice
        with self._span(incoming) as span:
            placed = PlacedTask(
                task_id=task.task_id,
                kind="inference",
                node=self._choose(task, span),
                gateway=task.gateway,
                traceparent=traceparent_of(span),
                overdue_s=self._clock.now_s() + task.timeout_s + OVERDUE_SLACK_S,
            )
            await self._apply(TaskAssigned(placed))
            await self._bus.publish(ASSIGN.at(node=placed.node), task, traceparent=placed.traceparent)
        return Placed(node=placed.node)

    async def _place(self, incoming: Incoming[TrainingTask]) -> Placed:
        task = incoming.message
        await self._pass_time()
        if already := self._state.placed(task.task_id):
            return Placed(node=already.node)
        with self._span(incoming) as span:
            node = self._choose(task, span)
            await self._apply(TaskAssigned(PlacedTask(task_id=task.task_id, kind="training", node=node)))
        return Placed(node=node)

    async def _status(self, incoming: Incoming[StatusRequest]) -> ClusterStatus:
        await self._pass_time()
        return ClusterStatus(policy=self._policy.name, nodes=self._state.status())

    def _choose(self, task: Task, span: Span) -> int:
        """Raises RefusedError when no node can take the task."""
        node = self._policy.choose(self._state, task)
        if node is None:
            raise RefusedError(f"no node is ready ({self._state.num_nodes} known)", code=503)
        span.set_attribute("lemix.node", node)
        return node

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
        for lost in self._state.apply(event):
            failed = TaskFailed(task_id=lost.task.task_id, code=503, reason=lost.reason)
            await self._bus.publish(
                FAILED.at(gateway=lost.task.gateway), failed, traceparent=lost.task.traceparent
            )
