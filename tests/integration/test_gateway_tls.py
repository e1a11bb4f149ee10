"""HTTPS: the gateway shows its certificate, and programs of its machine trust just that one."""

from pathlib import Path

import pytest

from lemix.client import ApiError, served_model
from lemix.ports import trusting
from services.gateway.http.server import server_config
from services.gateway.settings import GatewaySettings
from shared.errors import ConfigurationError
from shared.settings import read_settings
from tests.support.certificates import Authority
from tests.support.gateway import MODEL, gateway_world, served


async def test_a_gateway_with_a_certificate_speaks_https_alone(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.issue("gateway")
    other, _ = authority.issue("other")
    files = {"tls_certificate": str(certificate), "tls_key": str(key)}
    async with gateway_world(**files) as world, served(world) as plain:
        url = plain.replace("http://", "https://")
        assert await served_model(url, trusting(certificate)) == MODEL
        for address, trusted in ((url, other), (plain, certificate)):
            with pytest.raises(ApiError, match="no answer"):
                await served_model(address, trusting(trusted))


async def test_a_certificate_that_cannot_be_used_is_named() -> None:
    settings = GatewaySettings.given(tls_certificate=Path("/nowhere.pem"))
    with pytest.raises(ConfigurationError, match=r"LEMIX_TLS_CERTIFICATE.*/nowhere\.pem"):
        server_config(None, settings)
    with pytest.raises(ConfigurationError, match=r"LEMIX_TLS_CERTIFICATE.*/nowhere\.pem"):
        trusting(Path("/nowhere.pem"))


def test_a_key_without_a_certificate_is_a_mistake() -> None:
    with pytest.raises(ConfigurationError, match="LEMIX_TLS_KEY=/key is of no use without"):
        read_settings(GatewaySettings, {"LEMIX_TLS_KEY": "/key"})
