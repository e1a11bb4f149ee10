"""The gateway's settings."""

from pydantic import Field

from shared.settings import LemixSettings


class GatewaySettings(LemixSettings):
    """Where the gateway listens, and what it allows a client."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one."""
    request_timeout_s: float = Field(default=300.0, gt=0)
    """A request older than this ends with an error (504)."""
    health_timeout_s: float = Field(default=5.0, gt=0)
    """`/health` reports a failure when no token came within this time."""
    max_body_bytes: int = Field(default=1 << 20, gt=0)
    max_choices: int = Field(default=32, gt=0)
    """Prompts times `n` of one request."""
    max_stop_length: int = Field(default=256, gt=0)
    """Characters of one stop string."""
    max_concurrent_requests: int = Field(default=256, gt=0)
    """Completions beyond this are refused (429)."""
