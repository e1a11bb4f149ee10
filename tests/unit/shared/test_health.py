"""The line and the file by which others see that a service is well."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from lemix.simulation.loop import run_virtual
from shared.errors import ConfigurationError
from shared.health import FRESHEN_EVERY_S, Health, always_well, show_readiness

LONG_S = 10 * FRESHEN_EVERY_S


class Service:
    """It and its server may be well or not."""

    def __init__(self) -> None:
        self.well = False
        self.connected = True

    async def is_well(self) -> bool:
        return self.well

    async def ping(self) -> bool:
        return self.connected


@asynccontextmanager
async def kept(health: Health, service: Service) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        keeping = group.create_task(health.keep(service.ping))
        yield
        keeping.cancel()


def test_the_file_is_fresh_only_while_the_service_and_its_server_are_well(tmp_path: Path) -> None:
    file, service = tmp_path / "healthy", Service()
    file.touch()  # of an earlier process

    async def is_fresh() -> bool:
        file.unlink(missing_ok=True)
        await asyncio.sleep(LONG_S)
        return file.exists()

    async def watch() -> list[bool]:
        health = Health(file)
        async with kept(health, service):
            seen = [await is_fresh()]
            health.begin("x", service.is_well)
            seen.append(await is_fresh())
            service.well = True
            seen.append(await is_fresh())
            service.connected = False
            seen.append(await is_fresh())
            service.connected, service.well = True, False
            seen.append(await is_fresh())
            return seen

    assert run_virtual(watch()) == [False, False, True, False, False]


def test_a_file_of_an_earlier_process_goes_first(tmp_path: Path) -> None:
    file = tmp_path / "healthy"
    file.touch()

    async def watch() -> bool:
        async with kept(Health(file), Service()):
            await asyncio.sleep(LONG_S)
            return file.exists()

    assert not run_virtual(watch())


def test_being_ready_is_said_once_whatever_the_log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    caplog.handler.setLevel(logging.NOTSET)  # only the loggers decide, as where a service runs
    show_readiness()

    async def watch() -> None:
        service, health = Service(), Health()
        async with kept(health, service):
            health.begin("http://here", service.is_well)
            await asyncio.sleep(LONG_S)
            assert not caplog.messages
            service.well = True
            await asyncio.sleep(LONG_S)
            assert caplog.messages == ["ready: http://here"]
            service.well = False
            await asyncio.sleep(LONG_S)
            service.well = True
            await asyncio.sleep(LONG_S)

    run_virtual(watch())
    assert caplog.messages == ["ready: http://here"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    async def watch() -> None:
        health = Health(tmp_path / "nowhere" / "healthy")
        health.begin("x")
        await health.keep(always_well)

    with pytest.raises(ConfigurationError, match=r"LEMIX_HEALTH_FILE: .*nowhere"):
        run_virtual(watch())
