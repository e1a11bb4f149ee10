"""The gateway between HTTP and the cluster: sequences out, tokens in. Knows neither HTTP nor text.

Sequences go to the scheduler by request; their tokens come from the last stage of whichever node
they were placed on, to a subject of this gateway. A `Session` gathers what arrives for the
sequences of one request, and ends in one of two ways: every sequence finished, or one error.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

from services.gateway.sent_sequence import NODE_LOST, SentSequence, SequenceSpec
from shared.bus.base import Bus, Incoming
from shared.clock import Clock, IdSource
from shared.errors import BusError, LemixError, RefusedError
from shared.messages.cluster import ClusterStatus, StatusRequest
from shared.messages.inference import (
    DEFERRED,
    CancelTask,
    InferenceTask,
    Placed,
    SequenceResult,
    TaskFailed,
    TokensProduced,
)
from shared.messages.weights import WeightsRequest, WeightsStatus
from shared.subjects import CANCEL, FAILED, NODE_WEIGHTS, STATUS, SUBMIT, TOKENS
from shared.telemetry import Telemetry

SUBMIT_TIMEOUT_S = 10.0
SHORTEST_TIMEOUT_S = 0.001
"""A sequence that is sent again at the end of its time still has some."""
STATUS_TIMEOUT_S = 1.0

log = logging.getLogger(__name__)


class Arrival(NamedTuple):
    """The tokens that an iteration produced for one sequence of a session."""

    place: int
    """Which sequence of the session."""
    result: SequenceResult
    weights_version: int
    at_s: float
    """When it reached the gateway (monotonic seconds)."""
    node: int
    """Which node produced it."""


class Session:
    """The sequences of one request on their way; made by `ClusterClient.submit`, ended by `close`.

    What waits here is bounded by what was asked for: a result for each token and prompt chunk.
    """

    def __init__(
        self,
        client: "ClusterClient",
        specs: Sequence[SequenceSpec],
        *,
        arrived_s: float,
        deadline_s: float,
        traceparent: str,
    ) -> None:
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.traceparent = traceparent
        self._client = client
        self._sequences = [SentSequence(spec) for spec in specs]
        self._places: dict[str, int] = {}
        """By task; a sequence that was sent again is another task."""
        self._running: set[str] = set()
        self._unwanted: set[str] = set()
        self._placed: dict[str, Placed] = {}
        self._arrivals: list[Arrival] = []
        self._error: LemixError | None = None
        self._changed = asyncio.Event()
        self._admitted = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def placements(self) -> tuple[Placed | None, ...]:
        """The scheduler's answer for each sequence; None: none yet."""
        return tuple(self._placed.get(sequence.task_id) for sequence in self._sequences)

    async def next(self) -> list[Arrival]:
        """Wait for results, and take all that are here; none after `wake`.

        Raises the error that ended the session: RefusedError (504 when it was too old), or what
        `Bus.request` raises, or what `fail` was called with.
        """
        if not self._arrivals and self._error is None:
            self._changed.clear()
            await self._changed.wait()
        arrivals, self._arrivals = self._arrivals, []
        if self._error is not None and not arrivals:
            raise self._error
        return arrivals

    def wake(self) -> None:
        """Let `next` return."""
        self._changed.set()

    async def admitted(self) -> None:
        """Return when every sequence has a node, or when the session has failed (`next` says why)."""
        await self._admitted.wait()

    def fail(self, error: LemixError) -> None:
        """End the session with `error`; the first error counts."""
        self._error = self._error or error
        self._changed.set()
        self._admitted.set()

    def stop(self, place: int) -> None:
        """End this sequence: free its work."""
        self._stop(self._sequences[place].task_id)

    def close(self) -> None:
        """Free all work that is left; safe to call twice."""
        if self._timer is not None:
            self._timer.cancel()
        for sequence in self._sequences:
            self._stop(sequence.task_id)

    def _stop(self, task_id: str) -> None:
        if task_id in self._running:
            self._running.remove(task_id)
            self._unwanted.add(task_id)
            self._client.forget(task_id, self._node_of(task_id))

    def begin(self) -> None:
        """Send all sequences (called by the gateway)."""
        for place in range(len(self._sequences)):
            self._send(place)

    def _send(self, place: int) -> None:
        task = self._client.send(self, self._sequences[place])
        self._places[task.task_id] = place
        self._running.add(task.task_id)

    def add(self, result: SequenceResult, weights_version: int, at_s: float, node: int) -> None:
        """Take in a result that has arrived (called by the gateway)."""
        task_id = result.task_id
        place = self._places[task_id]
        self._sequences[place].note(result)
        self._arrivals.append(Arrival(place, result, weights_version, at_s, node))
        self._changed.set()
        if result.finish is not None:
            self._end(task_id)

    def refused(self, task_id: str, error: RefusedError, *, may_mix_weights: bool) -> None:
        """Note that no answer will come for a task: another node goes on, or the session fails (called by the
        gateway).
        """
        place = self._places[task_id]
        self._end(task_id, self._node_of(task_id))
        can_go_on = self._sequences[place].can_go_on(may_mix_weights=may_mix_weights)
        if error.code == NODE_LOST and self._error is None and can_go_on:
            log.warning("%s is sent again: %s", task_id, error)
            self._sequences[place].lost_because = str(error)
            self._placed.pop(task_id, None)
            self._send(place)
        else:
            self.fail(error)

    def not_placed(self, task_id: str, error: LemixError) -> None:
        """Note that the task gets no node (called by the gateway)."""
        if reason := self._sequences[self._places[task_id]].lost_because:
            error = RefusedError(f"{reason}; it could not go on elsewhere: {error}", code=NODE_LOST)
        self.fail(error)

    def wants(self, task_id: str) -> bool:
        """Whether somebody still waits for the task's answer."""
        return task_id in self._running and self._error is None

    def placed(self, task_id: str, placed: Placed) -> bool:
        """Note where the task went (called by the gateway). False when nobody wants it any more."""
        if self._sequences[self._places[task_id]].task_id == task_id:  # it was not lost before this came
            self._placed[task_id] = placed
        if len(self._placed) == len(self._sequences):
            self._admitted.set()
        return task_id not in self._unwanted

    def _node_of(self, task_id: str) -> int | None:
        return self._placed[task_id].node if task_id in self._placed else None

    def _end(self, task_id: str, node: int | None = None) -> None:
        self._running.remove(task_id)
        self._client.forget(task_id, node)

    def fail_after(self, timeout_s: float) -> None:
        """End with an error if the session is still open then (called by the gateway)."""
        error = RefusedError(f"the request was not finished within {timeout_s:g} s", code=504)
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self.fail, error)


class ClusterClient:
    """Submits sequences to the cluster and hands out what comes back; live inside `running()`."""

    def __init__(
        self,
        *,
        bus: Bus,
        clock: Clock,
        ids: IdSource,
        telemetry: Telemetry,
        request_timeout_s: float,
        may_mix_weights: bool = True,
        user: str = "gateway",
    ) -> None:
        """`user`: the name of its NATS user, which alone hears what comes for it.

        `may_mix_weights`: a sequence that has tokens may go on on another node, with the weights there."""
        self._bus = bus
        self._clock = clock
        self._ids = ids
        self._telemetry = telemetry
        self._timeout_s = request_timeout_s
        self._may_mix_weights = may_mix_weights
        self._group = asyncio.TaskGroup()
        self._sessions: dict[str, Session] = {}
        self._placing: set[asyncio.Task[None]] = set()
        self.gateway_id = f"{user}.{ids.new('gateway')}"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Listen for tokens until the block ends; sessions still open then fail with 503."""
        async with self._group:
            tokens = await self._bus.subscribe(TOKENS.at(gateway=self.gateway_id), self._on_tokens)
            failed = await self._bus.subscribe(FAILED.at(gateway=self.gateway_id), self._on_failed)
            try:
                yield
            finally:
                self.end_sessions()
                await tokens.unsubscribe()
                await failed.unsubscribe()

    def spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Run `work` beside the gateway; an error that escapes it ends the gateway."""
        return self._group.create_task(work)

    def submit(
        self, specs: Sequence[SequenceSpec], *, arrived_s: float | None = None, traceparent: str = ""
    ) -> Session:
        """Send sequences to the scheduler; the session reports everything that becomes of them.

        `arrived_s`: when they were asked for (this client's clock); None: now.
        """
        now_s = self._clock.now_s()
        session = Session(
            self,
            specs,
            arrived_s=now_s if arrived_s is None else arrived_s,
            deadline_s=now_s + self._timeout_s,
            traceparent=traceparent,
        )
        session.fail_after(self._timeout_s)
        session.begin()
        return session

    def send(self, session: Session, sequence: SentSequence) -> InferenceTask:
        """Have a sequence placed, for the first time or again (called by a session)."""
        now_s = self._clock.now_s()
        task = sequence.next_task(
            self._ids.new("req"),
            gateway=self.gateway_id,
            waited_s=now_s - session.arrived_s,
            timeout_s=max(SHORTEST_TIMEOUT_S, session.deadline_s - now_s),
        )
        self._sessions[task.task_id] = session
        placing = self.spawn(self._place(session, task))
        self._placing.add(placing)
        placing.add_done_callback(self._placing.discard)
        return task

    async def cluster_status(self) -> ClusterStatus:
        """Ask the scheduler for the cluster's status. Raises what `Bus.request` raises."""
        return await self._bus.request(
            STATUS.at(), StatusRequest(), timeout_s=STATUS_TIMEOUT_S, traceparent=self._telemetry.traceparent
        )

    async def weights_status(self) -> WeightsStatus:
        """Ask the trainer for the nodes' weights. Raises what `Bus.request` raises."""
        return await self._bus.request(
            NODE_WEIGHTS.at(),
            WeightsRequest(),
            timeout_s=STATUS_TIMEOUT_S,
            traceparent=self._telemetry.traceparent,
        )

    def end_sessions(self) -> None:
        """Fail every open session because the gateway stops."""
        for session in set(self._sessions.values()):
            session.fail(RefusedError("the gateway is shutting down", code=503))
            session.close()
        for placing in self._placing:
            placing.cancel()

    def forget(self, task_id: str, node: int | None) -> None:
        """Expect nothing more of a task (called by a session); it may still run on `node` if one is given."""
        del self._sessions[task_id]
        if node is not None:
            self.spawn(self._cancel(task_id, node))

    async def _place(self, session: Session, task: InferenceTask) -> None:
        try:
            placed = await self._ask_for_node(session, task)
        except LemixError as error:
            session.not_placed(task.task_id, error)
            return
        if placed is not None and not session.placed(task.task_id, placed):
            await self._cancel(task.task_id, placed.node)

    async def _ask_for_node(self, session: Session, task: InferenceTask) -> Placed | None:
        """Ask as long as the task is deferred; None: nobody wants it any more. Raises as `request` does."""
        while session.wants(task.task_id):
            try:
                return await self._bus.request(
                    SUBMIT.at(), task, timeout_s=SUBMIT_TIMEOUT_S, traceparent=session.traceparent
                )
            except RefusedError as error:
                if not error.reason.startswith(DEFERRED):
                    raise
        return None

    async def _cancel(self, task_id: str, node: int) -> None:
        """Stop a task, where NATS is there to say so; else it runs to its end, and nobody waits for it."""
        try:
            await self._bus.publish(CANCEL.at(node=node), CancelTask(task_id=task_id))
        except BusError as error:
            log.warning("task %s still runs on node %d: %s", task_id, node, error)

    async def _on_tokens(self, incoming: Incoming[TokensProduced]) -> None:
        message, at_s = incoming.message, self._clock.now_s()
        for result in message.results:
            session = self._sessions.get(result.task_id)
            if session is not None:
                session.add(result, message.weights_version, at_s, message.node)
            elif result.finish is None:  # given up; its node may never have heard of that
                await self._cancel(result.task_id, message.node)

    async def _on_failed(self, incoming: Incoming[TaskFailed]) -> None:
        failed = incoming.message
        session = self._sessions.get(failed.task_id)
        if session is not None:
            error = RefusedError(failed.reason, code=failed.code)
            session.refused(failed.task_id, error, may_mix_weights=self._may_mix_weights)
