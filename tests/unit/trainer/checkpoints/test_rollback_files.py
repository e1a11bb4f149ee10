"""Going back to an older checkpoint on the disk: all or nothing, wherever it is broken off."""

import pytest

from services.trainer.checkpoints import rollback_files
from services.trainer.checkpoints.files import CheckpointFiles
from shared import checkpoints
from shared.checkpoints import Manifest
from shared.errors import ConfigurationError
from shared.messages.training import ShardSaved
from tests.unit.trainer.checkpoints.test_files import files as files
from tests.unit.trainer.checkpoints.test_files import load, save
from tests.unit.trainer.support import break_disk_at, manifest


class Killed(BaseException):
    """Stands for `kill -9`: nothing may catch it."""


def target() -> Manifest:
    return manifest(1, watermark=5, discarded_batch_ids=("b", "c"))


def newest(files: CheckpointFiles) -> Manifest:
    return load(files)[0].manifest


def roll_back(files: CheckpointFiles) -> None:
    rollback_files.intend(files.root, target())
    rollback_files.complete(files.root, 0)


def names(files: CheckpointFiles) -> list[str]:
    return sorted(path.name for path in (files.root / "node-0").iterdir())


def test_newer_checkpoints_are_put_aside_and_the_older_one_says_what_was_discarded(
    files: CheckpointFiles,
) -> None:
    for version in (1, 2, 3):
        save(files, version)

    roll_back(files)

    assert names(files) == ["rolled-back-step-00000002", "rolled-back-step-00000003", "step-00000001"]
    assert newest(files) == target()


def test_what_was_put_aside_before_stays_beside_what_is_now(files: CheckpointFiles) -> None:
    save(files, 1)
    for _ in range(3):
        save(files, 2)
        roll_back(files)

    assert names(files) == [
        "rolled-back-step-00000002",
        "rolled-back-step-00000002-2",
        "rolled-back-step-00000002-3",
        "step-00000001",
    ]


def test_of_what_was_put_aside_only_the_newest_stay(files: CheckpointFiles) -> None:
    save(files, 1)
    for version in range(2, rollback_files.MAX_ASIDE + 4):
        save(files, version)
        roll_back(files)
    aside = [name for name in names(files) if name.startswith(rollback_files.ASIDE)]
    assert len(aside) == rollback_files.MAX_ASIDE
    assert aside[0] == "rolled-back-step-00000004"


def num_writes(files: CheckpointFiles) -> int:
    with pytest.MonkeyPatch.context() as patch:
        calls = break_disk_at(patch, 0, Killed())
        roll_back(files)
    return len(calls)


NUM_WRITES = 10


def test_the_cases_below_break_it_off_at_every_place(files: CheckpointFiles) -> None:
    for version in (1, 2, 3):
        save(files, version)
    assert num_writes(files) == NUM_WRITES


@pytest.mark.parametrize("nth", range(1, NUM_WRITES + 1))
def test_a_rollback_that_is_broken_off_is_not_begun_or_is_completed_at_the_next_start(
    files: CheckpointFiles, nth: int
) -> None:
    for version in (1, 2, 3):
        save(files, version)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        break_disk_at(patch, nth, Killed())
        roll_back(files)

    found = newest(files)

    assert found in (target(), manifest(3, sha256_by_file=found.sha256_by_file))
    decided = nth > 3  # the intention was written, synced and renamed
    assert found.version == (1 if decided else 3)
    assert newest(files) == found


@pytest.mark.parametrize("nth", range(1, 5))
def test_a_disk_that_refuses_the_intention_leaves_all_as_it_was(files: CheckpointFiles, nth: int) -> None:
    for version in (1, 2, 3):
        save(files, version)
    before = names(files)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="no space"):
        break_disk_at(patch, nth, OSError("no space"))
        roll_back(files)

    assert names(files) == before
    assert newest(files).version == 3


def save_of(files: CheckpointFiles, node: int, version: int) -> None:
    """A checkpoint without shards."""
    folder = files.temporary(node, version, 1)
    files.begin(folder)
    files.finish(
        folder,
        manifest(version, node=node, merge="average", recent_batch_ids=("a", "b"), held_out_loss=0.5),
        [ShardSaved(version=version, sha256_by_file={}, file_by_tensor={}, size_bytes=0)],
    )


NUM_SHARED_WRITES = 11


def roll_all_back(files: CheckpointFiles) -> None:
    """Node 0 has written version 2, which all hold then, and node 1 versions 1 and 3."""
    rollback_files.intend(files.root, manifest(1, node=1, merge="average"))
    rollback_files.complete(files.root, 1)


def test_newer_checkpoints_of_all_that_share_their_weights_are_put_aside(files: CheckpointFiles) -> None:
    for node, version in ((1, 1), (0, 2), (1, 3)):
        save_of(files, node, version)
    with pytest.MonkeyPatch.context() as patch:
        calls = break_disk_at(patch, 0, Killed())
        roll_all_back(files)

    assert len(calls) == NUM_SHARED_WRITES
    assert names(files) == ["rolled-back-step-00000002"]
    assert list(files.load(model="m", stream="")) == [1]


@pytest.mark.parametrize("nth", range(1, NUM_SHARED_WRITES + 1))
def test_all_that_share_their_weights_go_back_or_none(files: CheckpointFiles, nth: int) -> None:
    for node, version in ((1, 1), (0, 2), (1, 3)):
        save_of(files, node, version)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        break_disk_at(patch, nth, Killed())
        roll_all_back(files)

    found = {each.manifest.node: each.manifest.version for each in files.load(model="m", stream="").values()}

    assert found == ({1: 1} if nth > 3 else {0: 2, 1: 3})


def test_a_target_that_is_gone_is_no_intention(files: CheckpointFiles) -> None:
    save(files, 2)

    with pytest.raises(FileNotFoundError, match="step-00000001 was removed"):
        rollback_files.intend(files.root, target())

    assert names(files) == ["step-00000002"]


def test_an_intention_that_cannot_be_done_is_named(files: CheckpointFiles) -> None:
    save(files, 2)
    (files.root / "node-0" / "rollback.json").write_text(target().model_dump_json())

    with pytest.raises(ConfigurationError, match=r"rollback\.json is decided and cannot be done"):
        load(files)


def test_where_an_older_version_serves_that_one_is_listed_as_served(files: CheckpointFiles) -> None:
    for version in (1, 2, 3):
        save(files, version)

    def listed(served: dict[int, int]) -> list[int | None]:
        return [each.num_ahead for each in checkpoints.durable_versions(files.root, served)]

    assert listed({0: 2}) == [None, 0, None, None]
    assert listed({0: 5}) == [2, None, None, None]
    assert listed({0: 0}) == [None, None, None, 0], "the model as it was given"
    assert listed({}) == [None, None, None, None]


def test_versions_are_listed_with_what_is_served(files: CheckpointFiles) -> None:
    for node, version in ((0, 1), (0, 2), (1, 7)):
        save_of(files, node, version)

    listed = checkpoints.durable_versions(files.root, {0: 4})

    assert [(each.node, each.version, each.num_ahead) for each in listed] == [
        (0, 2, 2),
        (0, 1, None),
        (0, 0, None),
        (1, 7, None),
        (1, 0, None),
    ]
    assert {(each.newest_batch_id, each.held_out_loss) for each in listed if each.version} == {("b", 0.5)}
