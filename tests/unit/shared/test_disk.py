"""Files that last."""

import os
from pathlib import Path
from typing import Any

import pytest

from shared.disk import replace_file


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_file(path, "old")
    replace_file(path, "new, ü")
    assert [(each.name, each.read_text("utf-8")) for each in tmp_path.iterdir()] == [("a.json", "new, ü")]


@pytest.mark.parametrize(("owner", "name"), [(Path, "write_text"), (os, "fsync"), (Path, "replace")])
def test_a_disk_that_refuses_leaves_what_there_was_and_nothing_else(
    owner: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    replace_file(path, "old")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(owner, name, refuse)
        with pytest.raises(OSError, match="No space left"):
            replace_file(path, "new")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.json", "old")]
