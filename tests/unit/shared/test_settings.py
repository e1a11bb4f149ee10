"""Settings that are given, and not read."""

import pytest
from pydantic import ValidationError

from shared.settings import LemixSettings


def test_given_settings_know_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMIX_NATS_URL", "nats://elsewhere:1")
    monkeypatch.setenv("LEMIX_LOG_LEVEL", "nonsense")
    settings = LemixSettings.given(model="m")
    assert (settings.model, settings.log_level) == ("m", "WARNING")
    assert settings.nats_url == LemixSettings.model_fields["nats_url"].default
    assert settings.model_fields_set == {"model"}


def test_given_settings_are_checked() -> None:
    with pytest.raises(ValidationError, match="log_level"):
        LemixSettings.given(log_level="nonsense")
