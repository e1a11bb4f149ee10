"""The file of keys: its mode, its changes, and who sees them when."""

import stat
import threading
from pathlib import Path

import pytest

from services.gateway.access.key_file import KeyRing, add_key, read_keys, remove_key
from services.gateway.access.keys import Key, digest_of
from shared.errors import ConfigurationError


class TickingClock:
    """Shows what a test sets."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def now_s(self) -> float:
        return self.seconds

    def wall_s(self) -> float:
        return self.seconds


def key(key_id: str) -> Key:
    return Key(id=key_id, name="me", digest=digest_of(key_id), scopes=("infer",), created_at=0)


def test_only_its_owner_may_read_it_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "run" / "keys.json"
    add_key(path, key("a"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {entry.name for entry in path.parent.iterdir()} == {"keys.json", "keys.lock"}


def test_keys_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    assert read_keys(path) is None
    add_key(path, key("a"))
    add_key(path, key("b"))
    assert read_keys(path) == {"a": key("a"), "b": key("b")}
    assert remove_key(path, "a") == key("a")
    with pytest.raises(ConfigurationError, match="no such key: 'a'"):
        remove_key(path, "a")
    remove_key(path, "b")
    assert read_keys(path) == {}, "a file without keys lets nobody in; no file would"


def test_keys_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    threads = [threading.Thread(target=add_key, args=(path, key(str(number)))) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_keys(path) or {}) == {str(number) for number in range(8)}


@pytest.mark.parametrize("content", ["", "{}", '{"keys": [{"id": "a"}]}', "[]"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"keys\.json"):
        read_keys(path)


def test_a_change_is_seen_within_a_second_and_the_file_is_not_looked_at_before(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", TickingClock()
    ring = KeyRing(path, clock)
    assert ring.keys() is None
    add_key(path, key("a"))
    assert ring.keys() is None
    clock.seconds += 0.9
    assert ring.keys() == {"a": key("a")}
    remove_key(path, "a")
    clock.seconds += 0.9
    assert ring.keys() == {}


def test_keys_whose_file_is_gone_let_nobody_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, clock = tmp_path / "keys.json", TickingClock()
    add_key(path, key("a"))
    ring = KeyRing(path, clock)
    path.unlink()
    clock.seconds += 1
    assert ring.keys() == {}, "without a file from the beginning it would be None: everyone on this machine"
    assert "is gone" in caplog.text
    add_key(path, key("b"))
    clock.seconds += 1
    assert ring.keys() == {"b": key("b")}


def test_a_change_that_cannot_be_read_leaves_the_keys_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "keys.json", TickingClock()
    add_key(path, key("a"))
    ring = KeyRing(path, clock)
    path.write_text("{")
    clock.seconds += 1
    assert ring.keys() == {"a": key("a")}
    assert "keys.json" in caplog.text


def test_no_folder_is_made_for_a_key_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such key: 'a'"):
        remove_key(tmp_path / "misspelt" / "keys.json", "a")
    assert not any(tmp_path.iterdir())
