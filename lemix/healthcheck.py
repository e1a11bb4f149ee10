"""Health checks of containers: `python -m lemix.healthcheck scheduler | stage | trainer MONITOR`.

Each check sees the service from outside, over the bus; exit status 0 means well. The gateway needs
none: its `/health` is asked over HTTP.
"""

import asyncio
import sys

import httpx

from lemix.bus import open_bus
from lemix.status import fetch_status
from services.stage_worker.settings import StageWorkerSettings
from shared.bus.base import Incoming
from shared.errors import ConfigurationError, LemixError
from shared.messages.cluster import Heartbeat
from shared.settings import LemixSettings, read_settings
from shared.subjects import HEARTBEAT, HEARTBEAT_S

PATIENCE_S = 5 * HEARTBEAT_S
POLL_S = 0.2


class UnwellError(LemixError):
    """The service does not do what it is there for; the message says what is missing."""


async def check_scheduler(nats_url: str) -> None:
    """The scheduler answers a status request."""
    async with open_bus(nats_url) as bus:
        await fetch_status(bus)


async def check_stage(nats_url: str, *, node: int, stage: int) -> None:
    """The stage is heard on the bus, and says that it is ready."""
    well = asyncio.Event()

    async def hear(incoming: Incoming[Heartbeat]) -> None:
        beat = incoming.message
        if (beat.node, beat.stage, beat.ready) == (node, stage, True):
            well.set()

    async with open_bus(nats_url) as bus:
        await bus.subscribe(HEARTBEAT.at(), hear)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await well.wait()
        except TimeoutError:
            raise UnwellError(f"stage {stage} of node {node} was not heard to be ready") from None


async def check_trainer(monitor_url: str) -> None:
    """NATS has a request for training batches waiting, that only a living trainer can have made."""
    async with httpx.AsyncClient(base_url=monitor_url, timeout=PATIENCE_S, trust_env=False) as monitor:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not await _is_reading(monitor):  # noqa: ASYNC110  # asked over HTTP
                    await asyncio.sleep(POLL_S)
        except (TimeoutError, httpx.HTTPError) as error:
            raise UnwellError(f"nobody was seen reading training batches {error}".strip()) from None


async def _is_reading(monitor: httpx.AsyncClient) -> bool:
    accounts = (await monitor.get("/jsz", params={"consumers": "true"})).json().get("account_details", [])
    return any(
        consumer["name"].startswith("trainer_") and consumer["num_waiting"] > 0
        for account in accounts
        for stream in account.get("stream_detail", [])
        for consumer in stream.get("consumer_detail") or []
    )


async def check(arguments: list[str]) -> None:
    """Check the service. Raises LemixError when it is not well, or unknown."""
    match arguments:
        case ["scheduler"]:
            await check_scheduler(read_settings(LemixSettings).nats_url)
        case ["stage"]:
            settings = read_settings(StageWorkerSettings)
            await check_stage(settings.nats_url, node=settings.node, stage=settings.stage)
        case ["trainer", monitor_url]:
            await check_trainer(monitor_url)
        case _:
            raise ConfigurationError(
                "usage: python -m lemix.healthcheck scheduler | stage | trainer MONITOR_URL"
            )


def main() -> None:
    try:
        asyncio.run(check(sys.argv[1:]))
    except LemixError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
