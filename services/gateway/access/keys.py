"""API keys: who may do what, and how a key that is shown is recognised."""

import hashlib
import hmac
from collections.abc import Mapping
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Scope = Literal["infer", "train", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
ServiceClass = Literal["interactive", "batch"]
"""Requests of the first expect their answers in time; those of the second go after them."""
SERVICE_CLASSES: tuple[ServiceClass, ...] = get_args(ServiceClass)
SECRET_BYTES = 32
"""Random bytes of a secret."""

MAX_LABEL_NAME = 64
"""Characters of a key's name that its label has."""

_PREFIX = "sk-lemix-"

_OPEN = ("/health", "/docs", "/openapi.json")
_ROUTES: Mapping[Scope, tuple[str, ...]] = {
    "train": ("/v1/files", "/v1/fine_tuning"),
    "infer": (
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/feedback",
        "/tokenize",
        "/detokenize",
    ),
}


class Key(BaseModel):
    """The record of a key: everything but the key itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    name: str
    """For people."""
    digest: str
    scopes: tuple[Scope, ...] = Field(min_length=1)
    service_class: ServiceClass = "interactive"
    created_at: int
    """Seconds since the Unix epoch."""
    requests_per_minute: int | None = Field(default=None, gt=0)
    tokens_per_minute: int | None = Field(default=None, gt=0)
    """Tokens of prompts and completions together. None: no limit."""

    @property
    def label(self) -> str:
        """How people know it; as short as a producer's name must be."""
        return f"{self.name[:MAX_LABEL_NAME]} ({self.id})"

    def allows(self, scope: Scope) -> bool:
        """Whether the key may do what needs `scope`; an admin may do everything."""
        return scope in self.scopes or "admin" in self.scopes


def scope_of(path: str) -> Scope | None:
    """The scope that a path needs; None: no key is needed. A path that is not named needs `admin`."""
    if _is_under(path, _OPEN):
        return None
    return next((scope for scope, routes in _ROUTES.items() if _is_under(path, routes)), "admin")


def _is_under(path: str, routes: tuple[str, ...]) -> bool:
    return any(path == route or path.startswith(f"{route}/") for route in routes)


def token_of(key_id: str, secret: str) -> str:
    """The token of a key, as its owner sends it."""
    return f"{_PREFIX}{key_id}-{secret}"


def digest_of(token: str) -> str:
    """The digest of a token, which is kept instead of it.

    A fast hash is right here. Slow ones protect passwords, which can be guessed; a secret of 256 random
    bits cannot, and a slow hash of whatever a stranger sends would keep the gateway busy.
    """
    return hashlib.sha256(token.encode()).hexdigest()


def find_key(keys: Mapping[str, Key], token: str) -> Key | None:
    """The key that `token` is, among `keys` by their ids.

    An id is no secret; whether the rest is right takes the same time whatever it is.
    """
    key = keys.get(token.removeprefix(_PREFIX).partition("-")[0])
    if key is None or not hmac.compare_digest(key.digest, digest_of(token)):
        return None
    return key
