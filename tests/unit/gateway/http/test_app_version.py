"""The version that `/openapi.json` tells."""

from importlib.metadata import PackageNotFoundError

import pytest

from services.gateway.http import app


def test_sources_that_are_not_installed_have_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(app, "version", version)
    assert app._version() == "unknown"
