"""Settings that are given, and not read."""

import pytest
from pydantic import ValidationError

from shared.errors import ConfigurationError
from shared.settings import LemixSettings, read_settings


def test_given_settings_know_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMIX_NATS_URL", "nats://elsewhere:1")
    monkeypatch.setenv("LEMIX_LOG_LEVEL", "nonsense")
    settings = LemixSettings.given(model="m")
    assert (settings.model, settings.log_level) == ("m", "WARNING")
    assert settings.nats_url == LemixSettings.model_fields["nats_url"].default
    assert settings.model_fields_set == {"model"}


def test_settings_are_read_from_the_environment_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMIX_MODEL", "of this process")
    assert read_settings(LemixSettings).model == "of this process"
    assert read_settings(LemixSettings, {"LEMIX_MODEL": "of another"}).model == "of another"
    with pytest.raises(ConfigurationError, match=r"LEMIX_LOG_LEVEL: .*'nonsense'"):
        read_settings(LemixSettings, {"LEMIX_LOG_LEVEL": "nonsense"})


def test_given_settings_are_checked() -> None:
    with pytest.raises(ValidationError, match="log_level"):
        LemixSettings.given(log_level="nonsense")
