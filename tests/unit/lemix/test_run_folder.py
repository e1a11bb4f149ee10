import os
import subprocess
import sys
from pathlib import Path

import pytest

from lemix.arenas import ArenaFolder, remove_abandoned
from lemix.run_folder import ClusterFile, RunFolder, check_run_name, clear, running_clusters
from shared.errors import ConfigurationError


def described(tmp_path: Path, name: str) -> RunFolder:
    """A run that is running, as far as other commands can tell."""
    run = RunFolder(tmp_path / name)
    run.claim()
    run.write_cluster(
        ClusterFile(nats_url=f"nats://{name}", api_url=f"http://{name}", launcher_pid=os.getpid(), pids={})
    )
    return run


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_belongs_to_one_launcher_at_a_time(tmp_path: Path) -> None:
    run = described(tmp_path, "a")
    with pytest.raises(ConfigurationError, match="'a' is already running"):
        RunFolder(tmp_path / "a").claim()
    run.release()
    again = RunFolder(tmp_path / "a")
    again.claim()
    again.release()


@pytest.mark.parametrize("name", ["", ".", "..", "../../x", "a/b", "/etc", "a/", "a\0b", "a\nb", "x" * 256])
def test_a_name_that_leads_elsewhere_is_no_name_of_a_run(name: str) -> None:
    with pytest.raises(ConfigurationError, match="one plain folder name"):
        check_run_name(name)


@pytest.mark.parametrize("name", ["default", "a b", "..a", "v1.2", "Übung", "x" * 255])
def test_any_plain_folder_name_is_one(name: str) -> None:
    check_run_name(name)


def test_the_clusters_that_are_running_are_found_by_name(tmp_path: Path) -> None:
    assert running_clusters(tmp_path) == {}
    one, two = described(tmp_path, "one"), described(tmp_path, "two")
    assert {name: found.nats_url for name, found in running_clusters(tmp_path).items()} == {
        "one": "nats://one",
        "two": "nats://two",
    }
    two.release()
    assert list(running_clusters(tmp_path)) == ["one"]
    one.release()
    assert running_clusters(tmp_path) == {}


def test_the_description_of_a_killed_launcher_is_not_believed(tmp_path: Path) -> None:
    described(tmp_path, "a").release()
    (tmp_path / "a" / "cluster.json").write_text(
        ClusterFile(nats_url="nats://a", api_url="", launcher_pid=1, pids={}).model_dump_json()
    )
    assert running_clusters(tmp_path) == {}


def test_the_port_of_nats_is_kept_until_the_run_is_cleared(tmp_path: Path) -> None:
    run = described(tmp_path, "a")
    assert run.nats_port is None
    run.keep_nats_port(4223)
    run.release()
    assert RunFolder(tmp_path / "a").nats_port == 4223
    clear(tmp_path / "a")
    assert RunFolder(tmp_path / "a").nats_port is None


def test_a_port_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "nats_port").write_text("many")
    with pytest.raises(ConfigurationError, match=r"cannot read a port from .*nats_port.*'many'.*; remove it"):
        _ = RunFolder(tmp_path).nats_port


def test_clearing_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    described(tmp_path, "a").release()
    for name in ("nats", "checkpoints"):
        (tmp_path / "a" / name).mkdir()
    (tmp_path / "a" / "spans.jsonl").touch()
    (tmp_path / "a" / "mine.txt").touch()
    clear(tmp_path / "a")
    clear(tmp_path / "never-there")
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["mine.txt"]


def test_a_running_run_is_not_cleared(tmp_path: Path) -> None:
    run = described(tmp_path, "a")
    with pytest.raises(ConfigurationError, match="still running"):
        clear(tmp_path / "a")
    run.release()


def test_an_arena_folder_is_private_and_removed_with_its_content(tmp_path: Path) -> None:
    arenas = ArenaFolder.create(tmp_path)
    assert arenas.path.stat().st_mode & 0o777 == 0o700
    (arenas.path / "arena").write_bytes(b"x")
    arenas.remove()
    assert list(tmp_path.iterdir()) == []


def test_only_abandoned_arena_folders_are_removed(tmp_path: Path) -> None:
    mine = ArenaFolder.create(tmp_path)
    abandoned = tmp_path / f"lemix-{dead_pid()}-0a1b2c3d"
    living = tmp_path / f"lemix-{os.getpid()}-0a1b2c3d"
    foreign = tmp_path / "lemix-notes-old"
    for folder in (abandoned, living, foreign):
        folder.mkdir()
    assert remove_abandoned(tmp_path) == [abandoned]
    assert sorted(tmp_path.iterdir()) == sorted([mine.path, living, foreign])
    mine.remove()


def test_a_locked_folder_stays_even_when_its_pid_seems_dead(tmp_path: Path) -> None:
    """A launcher in another container holds the lock, though its pid means nothing here."""
    mine = ArenaFolder.create(tmp_path)
    elsewhere = mine.path.rename(tmp_path / f"lemix-{dead_pid()}-0a1b2c3d")
    assert remove_abandoned(tmp_path) == []
    assert elsewhere.exists()
    ArenaFolder(elsewhere, mine._lock).remove()
