"""The extra `lemix[lab]`: what commands need that draw pictures, and services do not."""

from importlib.util import find_spec

from shared.errors import ConfigurationError

PACKAGES = ("matplotlib", "PIL")


def check_lab() -> None:
    """Raises ConfigurationError when the extra is not installed."""
    if any(find_spec(package) is None for package in PACKAGES):
        raise ConfigurationError("this command draws pictures: pip install 'lemix[lab]' first")
