"""TLS to NATS: certificates on both sides, and nothing in clear text where it was asked for."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lemix.nats_server import NatsServer
from shared.bus.access import access_of
from shared.bus.nats import NatsBus
from shared.bus.permissions import Role
from shared.errors import BusError, ConfigurationError, NotAllowedError
from shared.settings import LemixSettings
from tests.support.certificates import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
async def tls_url(tmp_path: Path, authority: Authority) -> AsyncIterator[str]:
    """A server that wants certificates of its clients, too."""
    certificate, key = authority.issue("server")
    config = tmp_path / "tls.conf"
    files = f'cert_file: "{certificate}", key_file: "{key}", ca_file: "{authority.certificate}"'
    config.write_text(f"tls {{ {files}, verify: true }}\n")
    async with NatsServer(tmp_path / "nats", config=config) as server:
        yield server.url.replace("nats://", "tls://")


async def connected(url: str, timeout_s: float = 10.0, **files: Path) -> NatsBus:
    settings = LemixSettings.given(nats_url=url, **files)
    return await NatsBus.connect(
        url, name="one", access=access_of(settings, Role.TRAINER), timeout_s=timeout_s
    )


async def test_both_sides_show_certificates(tls_url: str, authority: Authority) -> None:
    certificate, key = authority.issue("client")
    files = {"nats_ca": authority.certificate, "nats_certificate": certificate, "nats_key": key}
    bus = await connected(tls_url, **files)
    assert await bus.next_fence("trainer") == 1
    await bus.close()
    with pytest.raises(BusError, match="no connection to NATS"):
        await connected(tls_url, timeout_s=0.5, nats_ca=authority.certificate)


async def test_a_server_that_nobody_vouches_for_is_refused_at_once(tls_url: str, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    async with asyncio.timeout(5):
        with pytest.raises(NotAllowedError, match="LEMIX_NATS_CA"):
            await connected(tls_url, nats_ca=other.certificate)


async def test_a_server_without_tls_is_told_nothing(nats_server: NatsServer) -> None:
    with pytest.raises(BusError, match="speaks no TLS"):
        await connected(nats_server.url.replace("nats://", "tls://"), timeout_s=0.5)


@pytest.mark.parametrize("setting", ["nats_ca", "nats_certificate"])
def test_a_file_that_is_missing_is_named_with_its_setting(setting: str) -> None:
    settings = LemixSettings.given(nats_url="tls://127.0.0.1:1", **{setting: Path("/nowhere.pem")})
    with pytest.raises(ConfigurationError, match=rf"LEMIX_{setting.upper()}.*/nowhere\.pem"):
        access_of(settings, Role.TRAINER)


def test_files_without_tls_in_the_address_are_a_mistake() -> None:
    settings = LemixSettings.given(nats_url="nats://127.0.0.1:1", nats_ca=Path("/ca.pem"))
    with pytest.raises(ConfigurationError, match=r"LEMIX_NATS_URL must begin with tls"):
        access_of(settings, Role.TRAINER)
