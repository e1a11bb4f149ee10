"""`lemix keys`, as a person uses it."""

import re
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lemix.cli import app
from services.gateway.access.key_file import read_keys
from services.gateway.access.keys import find_key


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("LEMIX_KEYS_FILE", "LEMIX_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)


def lemix_keys(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def test_a_key_is_shown_once_listed_and_revoked(tmp_path: Path) -> None:
    made = lemix_keys("create", "--name", "Ada", "--scope", "infer,train", "--tokens-per-minute", "1000")
    token, path = made.stdout.strip(), tmp_path / "runs" / "default" / "keys.json"
    key = find_key(read_keys(path) or {}, token)
    assert key is not None
    assert (key.name, key.scopes, key.tokens_per_minute) == ("Ada", ("infer", "train"), 1000)
    assert (key.requests_per_minute, stat.S_IMODE(path.stat().st_mode)) == (None, 0o600)
    listed = lemix_keys("list").stdout
    assert re.search(rf"{key.id}\s+Ada\s+infer, train\s+interactive\s+no limit\s+1000", listed)
    assert token not in listed
    assert token not in path.read_text()
    assert lemix_keys("revoke", key.id).exit_code == 0
    assert read_keys(path) == {}


def test_the_run_or_the_setting_says_which_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lemix_keys("create", "--name", "a", "--run", "other")
    monkeypatch.setenv("LEMIX_KEYS_FILE", str(tmp_path / "mine.json"))
    lemix_keys("create", "--name", "b")
    names = {
        path: [key.name for key in (read_keys(tmp_path / path) or {}).values()]
        for path in ("runs/other/keys.json", "mine.json", "runs/default/keys.json")
    }
    assert names == {"runs/other/keys.json": ["a"], "mine.json": ["b"], "runs/default/keys.json": []}


def test_a_key_has_a_class(tmp_path: Path) -> None:
    for arguments in ((), ("--class", "batch")):
        lemix_keys("create", "--name", "Ada", *arguments)
    keys = (read_keys(tmp_path / "runs" / "default" / "keys.json") or {}).values()
    assert [key.service_class for key in keys] == ["interactive", "batch"]
    assert re.search(r"infer\s+interactive\s.*infer\s+batch", lemix_keys("list").stdout, re.DOTALL)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("create", "--name", "a", "--class", "first"), "interactive, batch"),
        (("create", "--name", "a", "--scope", "root"), "root"),
        (("create", "--name", "a", "--scope", ""), "infer, train, admin"),
        (("revoke", "nobody"), "nobody"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], told: str) -> None:
    failed = lemix_keys(*arguments)
    assert failed.exit_code != 0
    assert told in str(failed.exception)


@pytest.mark.parametrize("command", [("create", "--name", "a"), ("list",), ("revoke", "nobody")])
@pytest.mark.parametrize("run", ["../../x", "..", "/tmp/x", ""])
def test_a_path_is_no_name_of_a_run(command: tuple[str, ...], run: str, tmp_path: Path) -> None:
    failed = lemix_keys(*command, "--run", run)
    assert f"{run!r} is no name of a run" in str(failed.exception)
    assert list(tmp_path.iterdir()) == []
