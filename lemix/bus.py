"""A connection to the bus for as long as a command needs it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.bus.nats import NatsBus

TIMEOUT_S = 3.0
"""A command finds its cluster running: unlike a service, it waits for no server that is about to start."""


@asynccontextmanager
async def open_bus(nats_url: str) -> AsyncIterator[NatsBus]:
    """Connect to NATS for a while. Raises BusError when no server answers."""
    bus = await NatsBus.connect(nats_url, name="lemix", timeout_s=TIMEOUT_S)
    try:
        yield bus
    finally:
        await bus.close()
