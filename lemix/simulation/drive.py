"""Drives a workload against a cluster and records what happens. Knows a cluster by its bus alone.

So simulated and real clusters are driven, and measured, by the same lines.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from lemix.simulation.record import Op, OpLog, RequestRecord, RunRecord
from lemix.simulation.sent_batches import SentBatches
from lemix.simulation.sent_requests import send_requests
from lemix.simulation.workload import Workload
from services.gateway.cluster_client import ClusterClient
from shared.bus.base import Bus, Handler, Incoming
from shared.errors import ConfigurationError
from shared.lifecycle import World
from shared.messages.base import Message
from shared.messages.cluster import ClusterStatus, ForecastError, StatusRequest
from shared.messages.events import StageProgress
from shared.schedule import ScheduleName
from shared.subjects import PROGRESS, REPORT, STATUS, Subject

M = TypeVar("M", bound=Message)

STATUS_TIMEOUT_S = 5.0
SETTLE_S = 0.2
"""Stages report their last work within this time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveOptions:
    """How a workload is driven."""

    schedule: ScheduleName
    """The trainer's: it decides when the closed release goes on."""
    microbatches: int
    """The trainer's: parts of a batch, if it has so many sequences (and is not so long that it has more)."""
    request_timeout_s: float = 600.0
    """A request that is not answered by then has failed."""
    training_timeout_s: float = 3600.0
    """How long after the last request's end batches may still be applied; then the run is cut off."""


async def drive(world: World, workload: Workload, options: DriveOptions) -> RunRecord:
    """Run the workload to its end.

    Raises ConfigurationError when the cluster has no node.
    """
    before = await _status(world)
    nodes, num_stages = {node.node for node in before.nodes}, _num_stages(before)
    began_s = world.clock.now_s()
    batches = SentBatches(
        bus=world.bus,
        clock=world.clock,
        run_id=world.ids.new("run"),
        schedule=options.schedule,
        microbatches=options.microbatches,
        began_s=began_s,
    )
    log = OpLog()

    async def on_progress(incoming: Incoming[StageProgress]) -> None:
        nodes.add(incoming.message.node)
        _log_ops(log, incoming.message, world.clock.now_s() - began_s)

    async with (
        _subscribed(world.bus, REPORT.at(), batches.on_report),
        _subscribed(world.bus, PROGRESS.at(), on_progress),
    ):
        requests = await _run(world, workload, options, batches, began_s)
        trained, ended_s = batches.records(), world.clock.now_s() - began_s
        await asyncio.sleep(SETTLE_S)
    status = await _status(world)
    return RunRecord(
        num_nodes=len(nodes),
        num_stages=num_stages,
        ended_s=ended_s,
        requests=requests,
        batches=trained,
        ops=log,
        forward_error=_mean(status.forward_error),
        response_error=_mean(status.response_error),
    )


async def _run(
    world: World, workload: Workload, options: DriveOptions, batches: SentBatches, began_s: float
) -> tuple[RequestRecord, ...]:
    """Serve and train; returns when all requests have ended and all batches are applied, or given up."""
    gateway = ClusterClient(
        bus=world.bus,
        clock=world.clock,
        ids=world.ids,
        telemetry=world.telemetry,
        request_timeout_s=options.request_timeout_s,
    )
    async with gateway.running(), asyncio.TaskGroup() as group:
        training = group.create_task(batches.send(workload))
        requests = await send_requests(gateway, workload.requests, clock=world.clock, began_s=began_s)
        await asyncio.wait([training], timeout=options.training_timeout_s)
        training.cancel()
    return requests


@asynccontextmanager
async def _subscribed(bus: Bus, subject: Subject[M], handler: Handler[M]) -> AsyncIterator[None]:
    subscription = await bus.subscribe(subject, handler)
    try:
        yield
    finally:
        await subscription.unsubscribe()


def _log_ops(log: OpLog, progress: StageProgress, now_s: float) -> None:
    """Keep the ops that began within the run."""
    for ended in progress.ended:
        end_s = now_s - ended.ago_s
        start_s = end_s - ended.given_way_s - ended.elapsed_s
        if start_s >= 0:
            log.append(
                Op(
                    progress.node,
                    progress.stage,
                    ended.op.kind,
                    start_s,
                    end_s,
                    ended.op.num_tokens,
                    ended.given_way_s,
                )
            )


async def _status(world: World) -> ClusterStatus:
    return await world.bus.request(STATUS.at(), StatusRequest(), timeout_s=STATUS_TIMEOUT_S)


def _num_stages(status: ClusterStatus) -> int:
    counts = {beat.num_stages for node in status.nodes for beat in node.stages}
    if len(counts) != 1:
        raise ConfigurationError(f"the nodes must have one number of stages, not {sorted(counts)}")
    return counts.pop()


def _mean(error: ForecastError) -> float | None:
    return error.mean if error.count else None
