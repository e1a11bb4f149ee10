"""Clients of nats-py alone, as one of a server's users."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from nats.aio.client import Client

from shared.bus.access import read_credentials, user_file
from shared.bus.permissions import Role, User


async def client_of(
    url: str, users: Path, name: str, on_error: Callable[[Exception], Awaitable[None]]
) -> Client:
    """Connect as the user of that name in the folder `users`; `on_error` hears what the server refuses."""
    client = Client()
    await client.connect(
        url,
        nkeys_seed_str=read_credentials(user_file(users, name)).seed,
        inbox_prefix=User(name, Role.GATEWAY).inbox_prefix,
        error_cb=on_error,
        allow_reconnect=False,
    )
    return client
