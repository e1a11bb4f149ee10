"""A connection to the bus for as long as a command needs it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from shared.bus.access import access_of
from shared.bus.nats import NatsBus
from shared.bus.permissions import Role
from shared.settings import LemixSettings, read_settings

TIMEOUT_S = 3.0
"""A command finds its cluster running: unlike a service, it waits for no server that is about to start."""


@asynccontextmanager
async def open_bus(
    nats_url: str, nats_users: Path | None = None, role: Role = Role.OPERATOR
) -> AsyncIterator[NatsBus]:
    """Connect to NATS for a while, as the user of that role in the folder `nats_users` (None: as nobody).

    Raises BusError when no server answers, ConfigurationError without the user's file.
    """
    settings = read_settings(LemixSettings)
    settings = settings.model_copy(update={"nats_url": nats_url, "nats_users": nats_users})
    bus = await NatsBus.connect(nats_url, name="lemix", access=access_of(settings, role), timeout_s=TIMEOUT_S)
    try:
        yield bus
    finally:
        await bus.close()
