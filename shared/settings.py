"""Settings that every service shares, read from LEMIX_* environment variables."""

from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict

EMBEDDED_MODEL = str(Path(__file__).parent / "model" / "embedded")


class LemixSettings(BaseSettings):
    """Base of each service's own settings; frozen, so that what a run says it used is what it used."""

    model_config = SettingsConfigDict(
        env_prefix="LEMIX_", frozen=True, extra="ignore", protected_namespaces=()
    )

    nats_url: str = "nats://127.0.0.1:4222"
    run_dir: Path = Path("runs/default")
    """Spans, checkpoints and logs of this run go under this folder."""
    model: str = EMBEDDED_MODEL
    """A folder in Hugging Face format, or a hub name."""

    @property
    def checkpoint_dir(self) -> Path:
        return self.run_dir / "checkpoints"
