"""`lemix keys`: make, show and revoke API keys."""

from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex

from rich.console import Console
from rich.markup import escape

from lemix.printing import new_table, print_table, say
from services.gateway.access.key_file import add_key, read_keys, remove_key
from services.gateway.access.keys import SECRET_BYTES, Key, Scope, ServiceClass, digest_of, token_of
from shared.clock import Clock

ID_BYTES = 4


def create(
    path: Path,
    name: str,
    scopes: tuple[Scope, ...],
    *,
    service_class: ServiceClass,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    clock: Clock,
    console: Console,
) -> None:
    """Make a key and show it, this once. Raises ConfigurationError when the file cannot be written."""
    key_id = token_hex(ID_BYTES)
    token = token_of(key_id, token_hex(SECRET_BYTES))
    key = Key(
        id=key_id,
        name=name,
        digest=digest_of(token),
        scopes=scopes,
        service_class=service_class,
        created_at=int(clock.wall_s()),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )
    add_key(path, key)
    say(console, token)
    say(
        Console(stderr=True), f"key {key_id} ({name}: {', '.join(scopes)}) is shown this once; kept in {path}"
    )


def show(path: Path, console: Console) -> None:
    """List the keys, without what they are. Raises ConfigurationError when the file cannot be read."""
    table = new_table(f"keys of {path}")
    for heading in ("id", "name", "scopes", "class", "requests/min", "tokens/min", "made"):
        table.add_column(heading, overflow="fold")
    for key in (read_keys(path) or {}).values():
        made = datetime.fromtimestamp(key.created_at, UTC)
        limits = (key.requests_per_minute, key.tokens_per_minute)
        table.add_row(
            key.id,
            escape(key.name),
            ", ".join(key.scopes),
            key.service_class,
            *("no limit" if limit is None else str(limit) for limit in limits),
            f"{made:%Y-%m-%d %H:%M} UTC",
        )
    print_table(console, table)


def revoke(path: Path, key_id: str, console: Console) -> None:
    """Forget a key. Raises ConfigurationError when there is none of that id."""
    key = remove_key(path, key_id)
    say(console, f"revoked key {key.id} ({key.name}); a gateway that runs refuses it within a second")
