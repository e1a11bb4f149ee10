"""One run on a real cluster of this machine: real services over NATS, on emulated devices."""

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from lemix.bus import open_bus
from lemix.launcher import LocalCluster
from lemix.open_cluster import open_cluster
from lemix.simulation.cluster import (
    MAX_MICROBATCH_TOKENS,
    NEVER,
    SimulationOptions,
    devices_of,
    first_of,
)
from lemix.simulation.drive import drive
from lemix.simulation.record import RunRecord
from lemix.simulation.run import drive_options, planned
from lemix.simulation.workload import WorkloadOptions
from lemix.status import fetch_status
from lemix.studies.overheads import OverheadProbe, Overheads
from lemix.studies.runner import StudyFailedError
from lemix.topology import ClusterOptions
from lemix.waiting import wait_nodes_ready
from shared.bus.base import Bus
from shared.clock import IdSource, SystemClock
from shared.lifecycle import World
from shared.messages.cluster import ClusterStatus
from shared.profiles.profile import profile_named
from shared.subjects import PROGRESS
from shared.telemetry import NoTelemetry

REQUEST_TIMEOUT_S = 20.0
TRAINING_TIMEOUT_S = 60.0
"""After the last request's end: a study's batches take a tenth of it."""
RUN_TIMEOUT_S = 180.0
"""Limit for the whole run, whatever it may hang on."""

T = TypeVar("T")


async def run_cluster(options: SimulationOptions, workload: WorkloadOptions) -> tuple[RunRecord, Overheads]:
    """Run the workload on a cluster of this machine; return its record and its services' overheads.

    Raises ClusterFailedError when the cluster does not start or ends, StudyFailedError when not all was
    served and trained in time.
    """
    events: list[str] = []
    with TemporaryDirectory(prefix="lemix-live-") as folder:
        chosen = cluster_options(options, Path(folder))
        async with open_cluster(chosen, on_event=events.append) as cluster, open_bus(cluster.nats_url) as bus:
            await wait_nodes_ready(bus, options.nodes)
            run = await _watched(cluster, bus, run_workload(bus, options, workload))
            if events:
                raise StudyFailedError(f"not all services ran through: {'; '.join(events)}")
            return run


async def _watched(cluster: LocalCluster, bus: Bus, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, within RUN_TIMEOUT_S. Raises what ends the cluster or the bus meanwhile."""
    try:
        async with asyncio.timeout(RUN_TIMEOUT_S), asyncio.TaskGroup() as group:
            watching = [group.create_task(each) for each in (cluster.wait_failed(), bus.wait_failed())]
            result = await work
            for task in watching:
                task.cancel()
    except TimeoutError:
        raise StudyFailedError(f"the run was not over after {RUN_TIMEOUT_S:g} s") from None
    except BaseExceptionGroup as errors:
        raise first_of(errors) from None
    return result


async def run_workload(
    bus: Bus, options: SimulationOptions, workload: WorkloadOptions
) -> tuple[RunRecord, Overheads]:
    """Drive a cluster that is ready. Raises StudyFailedError."""
    clock, devices = SystemClock(), devices_of(options)
    world = World(bus=bus, clock=clock, ids=IdSource(random.Random(options.seed)), telemetry=NoTelemetry())
    probe = OverheadProbe(devices.times, clock)
    listening = await bus.subscribe(PROGRESS.at(), probe.on_progress)
    deadlines = replace(
        drive_options(options), request_timeout_s=REQUEST_TIMEOUT_S, training_timeout_s=TRAINING_TIMEOUT_S
    )
    record = await drive(world, planned(workload, options.seed), deadlines)
    await listening.unsubscribe()
    if missing := what_is_missing(record, workload.num_batches):
        raise StudyFailedError(f"not over in time, {missing}; {how_it_stands(await fetch_status(bus))}")
    return record, probe.overheads()


def what_is_missing(record: RunRecord, num_batches: int) -> str:
    """The requests that were given up and the batches that were not applied; empty: none."""
    requests = [
        f"request {place} (sent at {request.arrived_s:.2f} s to {request.nodes})"
        for place, request in enumerate(record.requests)
        if request.ended_s - request.arrived_s >= REQUEST_TIMEOUT_S
    ]
    batches = [
        f"batch {place} (sent at {batch.published_s:.2f} s)"
        for place, batch in enumerate(record.batches)
        if batch.applied_s is None
    ]
    num_unsent = num_batches - len(record.batches)
    unsent = [f"{num_unsent} batches that were never sent"] if num_unsent else []
    missing = [*requests, *batches, *unsent]
    return f"missing: {', '.join(missing)}" if missing else ""


def how_it_stands(status: ClusterStatus) -> str:
    """Describe the work that each node still has."""
    return "; ".join(
        f"node {node.node} {'is' if node.ready else 'is not'} ready, has {node.inference_tasks} requests,"
        f" {node.training_tasks} batches, {[stage.queued for stage in node.stages]} items queued by stage"
        for node in status.nodes
    )


def cluster_options(options: SimulationOptions, folder: Path) -> ClusterOptions:
    """The real cluster that is configured as the simulated one."""
    profile = profile_named(options.profile, options.stages)
    return ClusterOptions(
        name="live",
        runs_dir=folder,
        nodes=options.nodes,
        stages=profile.num_stages,
        emulate=options.profile,
        policy=options.policy,
        extra_env={
            "LEMIX_COSTS": options.costs,
            "LEMIX_DISCIPLINE": options.discipline,
            "LEMIX_SCHEDULE": options.schedule,
            "LEMIX_SLO_FACTOR": str(options.objectives.slo_factor),
            "LEMIX_MAX_MICROBATCH_TOKENS": str(MAX_MICROBATCH_TOKENS),
            "LEMIX_CHECKPOINT_EVERY": str(NEVER),
            "LEMIX_CHECKPOINT_IDLE_S": str(NEVER),
            "LEMIX_MAX_PENDING": str(NEVER),
            **{f"LEMIX_{name.upper()}": str(value) for name, value in options.stage_settings.items()},
            **{f"LEMIX_{name.upper()}": str(value) for name, value in options.trainer_settings.items()},
        },
    )
