"""How a process is let in by the NATS server: the user that it is, and TLS."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from shared.addresses import nats_address
from shared.bus.permissions import Role, User
from shared.errors import ConfigurationError
from shared.settings import LemixSettings

USER_FILE = "user.json"


class Credentials(BaseModel):
    """A user with the secret that proves it to be that user: its nkey's seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
    seed: Annotated[str, StringConstraints(pattern=r"^SU[A-Z2-7]{56}$")]


@dataclass(frozen=True, slots=True)
class Access:
    """All that a connection needs beside the server's address. None: without."""

    user: User | None = None
    seed: str = ""
    file: Path | None = None
    """Where the user and its seed were read."""
    tls: ssl.SSLContext | None = None


OPEN = Access()
"""To a server that lets everybody in."""


def access_of(settings: LemixSettings, role: Role) -> Access:
    """The access of a process of that role.

    Raises ConfigurationError naming the file that is missing or wrong.
    """
    tls = tls_of(settings)
    if settings.nats_users is None:
        return Access(tls=tls)
    file = user_file(settings.nats_users, role)
    credentials = read_credentials(file)
    return Access(User(credentials.name, role), credentials.seed, file, tls)


def user_file(users: Path, name: str) -> Path:
    """Where the folder `users` keeps a user: a folder for each, so that they can be mounted one by one."""
    return users / name / USER_FILE


def read_credentials(file: Path) -> Credentials:
    """Raises ConfigurationError when there is no user in the file."""
    try:
        return Credentials.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ConfigurationError(
            f"LEMIX_NATS_USERS: cannot read the NATS user in {file}: {error.strerror}"
        ) from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ConfigurationError(f"LEMIX_NATS_USERS: {file} is no NATS user: {faults}") from None


def tls_of(settings: LemixSettings) -> ssl.SSLContext | None:
    """How to speak TLS with the server; None where nobody asks for it. Raises ConfigurationError."""
    wants_tls = nats_address(settings.nats_url).wants_tls
    if not (wants_tls or settings.nats_ca or settings.nats_certificate):
        return None
    if not wants_tls:
        raise ConfigurationError("LEMIX_NATS_URL must begin with tls:// where TLS files are given")
    try:
        context = ssl.create_default_context(cafile=settings.nats_ca)
    except OSError as error:
        raise ConfigurationError(f"LEMIX_NATS_CA: cannot use {settings.nats_ca}: {error}") from error
    if settings.nats_certificate is not None:
        try:
            context.load_cert_chain(settings.nats_certificate, settings.nats_key)
        except OSError as error:
            raise ConfigurationError(
                f"LEMIX_NATS_CERTIFICATE, LEMIX_NATS_KEY: cannot use {settings.nats_certificate} "
                f"with {settings.nats_key}: {error}"
            ) from error
    return context
