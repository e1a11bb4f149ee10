"""A gateway in this process and behind a real socket, before a node of real stages or a scripted one.

It is set up as in a process of its own; only the bus is in memory.
"""

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from services.gateway.__main__ import run as run_gateway
from services.gateway.settings import GatewaySettings
from services.scheduler.__main__ import serving
from services.scheduler.settings import SchedulerSettings
from shared.bus.memory import MemoryBroker
from shared.clock import IdSource, SystemClock
from shared.lifecycle import World
from shared.settings import EMBEDDED_MODEL
from shared.telemetry import Telemetry
from tests.support.gateway import FakeCluster, Script
from tests.support.node import DEADLINE_S, running_node
from tests.support.waiting import LOOK_EVERY_S


@asynccontextmanager
async def whole_cluster(
    model: Path, run_dir: Path, *, num_stages: int = 1, **settings: Any
) -> AsyncIterator[str]:
    """Yields the address of a cluster that can answer. `settings`: of the gateway."""
    broker = MemoryBroker()
    async with (
        running_node(model, num_stages, run_dir, broker=broker),
        asyncio.TaskGroup() as group,
        _gateway(broker, {"model": str(model), "run_dir": run_dir, **settings}) as address,
    ):
        scheduler = group.create_task(serving(SchedulerSettings())(_world("scheduler", broker)))
        await _until(address, "/health")
        yield address
        scheduler.cancel()


@asynccontextmanager
async def scripted_cluster(script: Script | None, run_dir: Path, **settings: Any) -> AsyncIterator[str]:
    """Yields the address of a gateway with the embedded model's tokenizer, whose node answers by `script`."""
    broker = MemoryBroker()
    cluster = FakeCluster(broker.connect(), script)
    await cluster.start()
    async with _gateway(broker, {"model": EMBEDDED_MODEL, "run_dir": run_dir, **settings}) as address:
        yield address
    await cluster.bus.close()


@asynccontextmanager
async def _gateway(broker: MemoryBroker, settings: dict[str, Any]) -> AsyncIterator[str]:
    """Yields the address of a gateway that listens."""
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    chosen = GatewaySettings.model_validate({"port": port, **settings})
    async with asyncio.TaskGroup() as group:
        gateway = group.create_task(run_gateway(_world("gateway", broker), chosen))
        await _until(address, "/v1/models")
        yield address
        gateway.cancel()


def _world(name: str, broker: MemoryBroker) -> World:
    ids, telemetry = IdSource(random.Random(name)), Telemetry(name, None)
    return World(bus=broker.connect(), clock=SystemClock(), ids=ids, telemetry=telemetry)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _until(address: str, path: str) -> None:
    """Wait until the path is answered with 200."""
    async with asyncio.timeout(DEADLINE_S), httpx.AsyncClient(base_url=address, trust_env=False) as http:
        while not await _is_there(http, path):  # noqa: ASYNC110  # a client can only ask again
            await asyncio.sleep(LOOK_EVERY_S)


async def _is_there(http: httpx.AsyncClient, path: str) -> bool:
    try:
        return (await http.get(path)).status_code == 200
    except httpx.ConnectError:
        return False
