"""Worlds for the bus's contract: each gives as many connected buses as a case wants."""

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from lemix.nats_server import NatsServer
from shared.bus.base import Bus
from shared.bus.memory import MemoryBroker
from shared.bus.nats import NatsBus
from shared.bus.near import NearBus

Connect = Callable[[], Awaitable[Bus]]


CASE_TIMEOUT_S = 120.0


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """A case that hangs ends here. Not a fixture: its timeout would end the fixture's task."""
    for item in items:
        if item.path.parent == Path(__file__).parent and inspect.iscoroutinefunction(item.obj):
            item.obj = within_deadline(item.obj)


def within_deadline(case: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(case)
    async def run(*args: object, **kwargs: object) -> None:
        async with asyncio.timeout(CASE_TIMEOUT_S):
            await case(*args, **kwargs)

    return run


@pytest.fixture
def process_trace() -> str:
    """What the buses of these tests send when nothing else is given."""
    return f"00-{'a' * 32}-{'b' * 16}-01"


@pytest.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    async with NatsServer(tmp_path / "nats") as server:
        yield server


@pytest.fixture(params=["memory", "nats", "near"])
async def connect(
    request: pytest.FixtureRequest, tmp_path: Path, process_trace: str
) -> AsyncIterator[Connect]:
    """Connects one more service to the same world; all are closed at the end.

    `near`: each as a process of several stages sees it, and all its messages go to others.
    """
    buses: list[Bus] = []

    async def connected(bus: Bus) -> Bus:
        buses.append(bus)
        return bus

    if request.param != "nats":
        broker = MemoryBroker()

        def connect_memory() -> Awaitable[Bus]:
            bus = broker.connect(traceparent=process_trace)
            return connected(NearBus(bus, traceparent=process_trace) if request.param == "near" else bus)

        yield connect_memory
        await close_all(buses)
        return
    async with NatsServer(tmp_path / "nats") as server:

        async def connect_nats() -> Bus:
            return await connected(await NatsBus.connect(server.url, name="test", traceparent=process_trace))

        yield connect_nats
        await close_all(buses)


async def close_all(buses: list[Bus]) -> None:
    for bus in buses:
        await bus.close()
