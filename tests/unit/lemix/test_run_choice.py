"""Which run a command speaks to (two may be running)."""

from pathlib import Path

import pytest

from lemix.run_choice import Target, checkpoint_root, find_if_running, find_running
from lemix.run_folder import RunFolder
from shared.errors import ConfigurationError
from tests.unit.lemix.test_run_folder import described


def test_the_only_run_that_is_running_is_spoken_to(tmp_path: Path) -> None:
    run = described(tmp_path, "one")
    assert find_running(None, tmp_path, None) == Target("nats://one", "run one")
    assert find_running(None, tmp_path, "one") == Target("nats://one", "run one")
    assert checkpoint_root(tmp_path, None) == tmp_path / "one" / "checkpoints"
    run.release()


def test_of_two_runs_none_is_guessed_and_both_are_listed(tmp_path: Path) -> None:
    runs = [described(tmp_path, name) for name in ("one", "two")]
    refusal = r"2 runs are running under .*: one \(http://one\), two \(http://two\); choose one with --name"
    for ask in (find_running, find_if_running):
        with pytest.raises(ConfigurationError, match=refusal):
            ask(None, tmp_path, None)
    with pytest.raises(ConfigurationError, match=refusal):
        checkpoint_root(tmp_path, None)
    assert find_running(None, tmp_path, "two") == Target("nats://two", "run two")
    assert checkpoint_root(tmp_path, "two") == tmp_path / "two" / "checkpoints"
    for run in runs:
        run.release()


def test_a_run_that_is_not_running_is_named_with_those_that_are(tmp_path: Path) -> None:
    run = described(tmp_path, "one")
    with pytest.raises(ConfigurationError, match=r"run 'two' is not running under .*; those that are: one"):
        find_running(None, tmp_path, "two")
    assert find_if_running(None, tmp_path, "two") is None
    run.release()
    with pytest.raises(ConfigurationError, match="no LeMix is running under"):
        find_running(None, tmp_path, None)
    assert find_if_running(None, tmp_path, None) is None


def test_a_server_that_is_given_needs_no_run_and_bears_none_beside_it(tmp_path: Path) -> None:
    there = Target("nats://there:4222", "the cluster at there:4222")
    assert find_running("nats://there:4222", tmp_path, None) == there
    with pytest.raises(ConfigurationError, match=r"either a server .*there:4222.* or a run .*one"):
        find_running("nats://there:4222", tmp_path, "one")


@pytest.mark.parametrize("ask", [find_running, find_if_running, lambda _, *run: checkpoint_root(*run)])
def test_a_path_is_no_name_of_a_run(ask, tmp_path: Path) -> None:
    RunFolder(tmp_path / "outside").claim()
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigurationError, match=r"'\.\./outside' is no name of a run"):
        ask(None, tmp_path / "runs", "../outside")


def test_the_checkpoints_of_a_run_that_is_not_there_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no run 'default' under"):
        checkpoint_root(tmp_path, None)
    ended = RunFolder(tmp_path / "default")
    ended.claim()
    ended.release()
    assert checkpoint_root(tmp_path, None) == tmp_path / "default" / "checkpoints"
    with pytest.raises(ConfigurationError, match="there is no run 'other' under"):
        checkpoint_root(tmp_path, "other")
