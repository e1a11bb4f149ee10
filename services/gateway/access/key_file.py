"""The file of API keys: changed by `lemix keys`, read by the gateway whenever it has changed."""

import fcntl
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from services.gateway.access.keys import Key
from shared.clock import Clock
from shared.disk import replace_file
from shared.errors import ConfigurationError

_OWNER_ONLY = 0o600
_LOOK_EVERY_S = 0.5

log = logging.getLogger(__name__)

Keys = Mapping[str, Key]
"""By their ids."""


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...]


def read_keys(path: Path) -> Keys | None:
    """None: there is no such file. Raises ConfigurationError when it cannot be read."""
    try:
        content = _Content.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise ConfigurationError(f"{path} is no file of keys that can be read: {error}") from error
    return {key.id: key for key in content.keys}


def add_key(path: Path, key: Key) -> None:
    """Keep a key. Raises ConfigurationError when the file cannot be read or written."""
    with _changing(path) as keys:
        keys[key.id] = key


def remove_key(path: Path, key_id: str) -> Key:
    """Forget a key. The file stays when it was the last: from then on nobody has access.

    Raises ConfigurationError when there is no such key, or when the file cannot be read or written.
    """
    unknown = ConfigurationError(f"no such key: {key_id!r} (`lemix keys list` shows those of {path})")
    if not path.exists():  # nor is a folder made for it
        raise unknown
    with _changing(path) as keys:
        if key_id not in keys:
            raise unknown
        return keys.pop(key_id)


@contextmanager
def _changing(path: Path) -> Iterator[dict[str, Key]]:
    """Lend the keys to be changed in the block, one at a time; write them when it ends without an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = dict(read_keys(path) or {})
            yield keys
            content = _Content(keys=tuple(keys.values())).model_dump_json(indent=2)
            replace_file(path, content + "\n", mode=_OWNER_ONLY)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error


class KeyRing:
    """The keys in their file, as of at most half a second ago."""

    def __init__(self, path: Path, clock: Clock) -> None:
        """Raises ConfigurationError when the file cannot be read."""
        self._path = path
        self._clock = clock
        self._seen = self._signature()
        self._keys = read_keys(path)
        self._looked_s = clock.now_s()

    def keys(self) -> Keys | None:
        """None: there has been no file. When it is gone, nobody has access."""
        now_s = self._clock.now_s()
        if now_s - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = now_s
            self._look()
        return self._keys

    def _look(self) -> None:
        """Read the file when it has changed. It is small, so this needs no other thread."""
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        try:
            found = read_keys(self._path)
        except ConfigurationError as error:
            log.error("the keys stay as they were: %s", error)
            return
        if found is None and self._keys is not None:
            log.error("%s is gone: nobody has access until it is there again", self._path)
            found = {}
        self._keys = found

    def _signature(self) -> tuple[int, int, int] | None:
        """A value that differs whenever another file was put in this one's place."""
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size
