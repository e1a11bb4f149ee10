"""The gateway's settings."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import NoDecode

from shared.messages.lineage import MAX_SOURCES
from shared.settings import LemixSettings, split_commas

KEYS_FILE = "keys.json"
"""In the run's folder, unless a setting says otherwise."""


def _as_prefix(path: str) -> str:
    """A path that begins with a slash and does not end with one; or nothing."""
    inner = path.strip("/")
    return f"/{inner}" if inner else ""


class GatewaySettings(LemixSettings):
    """Where the gateway listens, and what it allows a client."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one."""
    tls_certificate: Path | None = None
    """Its certificate, with those between it and its authority's; None: it speaks plain HTTP."""
    tls_key: Path | None = None
    """The certificate's private key; None: it is in the same file."""
    root_path: Annotated[str, AfterValidator(_as_prefix)] = ""
    """Under which a proxy serves this gateway (`/llm`), whether it passes the prefix on or not."""
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)] = ()
    """Origins whose pages may use the API from a browser (`https://chat.example`), separated by commas."""
    keys_file: Path | None = None
    """Where the API keys are; None: `keys.json` in the run's folder."""
    insecure: bool = False
    """Listen where others reach it although there are no keys."""
    trusted_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)] = ()
    """Without keys: names by which the gateway may be called, separated by commas, beside this machine's own.

    None: no others, or any when it is insecure.
    """
    request_timeout_s: float = Field(default=300.0, gt=0)
    """A request older than this ends with an error (504)."""
    keep_alive_s: int = Field(default=620, gt=0)
    """How long an idle connection stays open.

    Longer than clients and proxies keep theirs (75 s, and up to 600 s), so that none of them sends a
    request on a connection that is just being closed.
    """
    ping_every_s: float = Field(default=15.0, gt=0)
    """A stream that is silent for so long sends a comment."""
    health_timeout_s: float = Field(default=5.0, gt=0)
    """`/health` reports a failure when no token came within this time."""
    max_body_bytes: int = Field(default=1 << 20, gt=0)
    """As it comes, and when it is decoded."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """A body that is not here after this time is given up (408)."""
    max_choices: int = Field(default=32, gt=0)
    """Prompts times `n` of one request."""
    max_stop_length: int = Field(default=256, gt=0)
    """Characters of one stop string."""
    weights_consistency: Literal["latest", "pinned"] = "latest"
    """The trainer's: `pinned` requests that have tokens are not tried again on another node."""
    max_concurrent_requests: int = Field(default=2048, gt=0)
    """Completions beyond this are refused (429)."""
    max_microbatch_tokens: int = Field(default=2048, ge=2, le=65_536)
    """The trainer's: a training example with more tokens is refused when its file is validated."""
    max_file_bytes: int = Field(default=64 << 20, gt=0)
    """Larger uploads are refused (413)."""
    max_file_lines: int = Field(default=100_000, gt=0)
    """Files with more lines are refused."""
    max_files: int = Field(default=100, gt=0)
    """Uploaded files that are kept."""
    max_jobs: int = Field(default=100, gt=0)
    """Fine-tuning jobs that are kept; a new one takes the place of the oldest that has ended."""
    max_running_jobs: int = Field(default=1, gt=0)
    """Fine-tuning jobs that train at the same time; others are queued."""
    max_batches_ahead: int = Field(default=8, gt=0)
    """Batches of a job that are published and not yet applied."""
    ask_after_s: float = Field(default=10.0, gt=0)
    """A job that has heard nothing of its batches for so long asks the trainer."""
    feedback: bool = False
    """Remember answers that are asked for with `store`, and train on corrections of them."""
    feedback_max_answers: int = Field(default=10_000, gt=0)
    """Answers that are remembered; the oldest make room."""
    feedback_max_bytes: int = Field(default=256 << 20, gt=0)
    """Their size together."""
    feedback_max_age_s: float = Field(default=30 * 86_400.0, gt=0)
    """How long one is remembered."""
    feedback_batch_size: int = Field(default=8, gt=0, le=MAX_SOURCES)
    """Corrections that are trained in one step."""
    feedback_batch_after_s: float = Field(default=60.0, ge=0)
    """A correction that has waited for so long for others is trained without them."""

    @model_validator(mode="after")
    def _key_has_a_certificate(self) -> Self:
        if self.tls_key is not None and self.tls_certificate is None:
            raise ValueError(f"LEMIX_TLS_KEY={self.tls_key} is of no use without LEMIX_TLS_CERTIFICATE")
        return self

    @property
    def keys_path(self) -> Path:
        return self.keys_file or self.run_dir / KEYS_FILE
