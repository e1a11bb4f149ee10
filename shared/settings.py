"""Settings that every service shares, read from LEMIX_* environment variables."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import ConfigurationError

EMBEDDED_MODEL = str(Path(__file__).parent / "model" / "embedded")
MAX_ITERATION_TOKENS = 512
"""Rows that a stage puts into one iteration, unless told otherwise."""


def split_commas(value: object) -> object:
    """The parts of a setting that is written with commas between them."""
    return tuple(filter(None, value.replace(" ", "").split(","))) if isinstance(value, str) else value


class LemixSettings(BaseSettings):
    """Base of each service's own settings; frozen, so that what a run says it used is what it used."""

    model_config = SettingsConfigDict(
        env_prefix="LEMIX_", frozen=True, extra="ignore", protected_namespaces=()
    )

    nats_url: str = "nats://127.0.0.1:4222"
    """`tls://` where the server's certificate is to be checked."""
    nats_users: Path | None = None
    """A folder with the NATS user of this process, `<role>/user.json`; None: the server asks for none."""
    nats_ca: Path | None = None
    """Certificates that may have signed the server's; None: those of this machine."""
    nats_certificate: Path | None = None
    """This process's own, where the server asks for one."""
    nats_key: Path | None = None
    """The certificate's private key; None: it is in the same file."""
    run_dir: Path = Path("runs/default")
    """Spans, checkpoints and logs of this run go under this folder."""
    model: str = EMBEDDED_MODEL
    """A folder in Hugging Face format, or a hub name."""
    chat_template: Path | None = None
    """A Jinja file to use instead of the model's own chat template."""
    health_file: Path | None = None
    """A file that is touched every few seconds while the service is well, for health checks of containers."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "WARNING"

    @classmethod
    def given(cls, **values: Any) -> Self:
        """Settings of these values, and defaults for all others, whatever the environment says."""
        settings = cls.__new__(cls)
        BaseModel.__init__(settings, **values)
        return settings

    def as_text(self, names: Iterable[str]) -> dict[str, str]:
        """The values of these settings, as people read them."""
        return {name: str(getattr(self, name)) for name in names}

    @property
    def checkpoint_dir(self) -> Path:
        return self.run_dir / "checkpoints"


S = TypeVar("S", bound=LemixSettings)


def read_settings(kind: type[S], environment: Mapping[str, str] | None = None) -> S:
    """Read settings from `environment` (None: this process's own).

    Raises ConfigurationError, naming each variable that is wrong.
    """
    keys = {name: f"LEMIX_{name.upper()}" for name in kind.model_fields}
    told = environment or {}
    given: dict[str, Any] = {name: told[key] for name, key in keys.items() if key in told}
    try:
        return kind(**given)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        raise ConfigurationError("; ".join(map(_describe, faults))) from error


def _describe(fault: ErrorDetails) -> str:
    if not fault["loc"]:  # of several settings together
        return fault["msg"].removeprefix("Value error, ")
    given = "" if fault["type"] == "missing" else f", not {fault['input']!r}"
    return f"LEMIX_{str(fault['loc'][0]).upper()}: {fault['msg']}{given}"
