"""Which checkpoint each node goes back to."""

from services.trainer.checkpoints.newest import NewestCheckpoints
from shared.checkpoints import Checkpoint
from tests.unit.trainer.support import NO_FOLDER, manifest


def checkpoint(node: int, version: int) -> Checkpoint:
    return Checkpoint(manifest(version, node=node), NO_FOLDER)


def test_nodes_that_train_apart_each_have_their_own() -> None:
    newest = NewestCheckpoints({0: checkpoint(0, 5)}, shares_weights=False)
    newest.add(checkpoint(1, 3))

    assert [newest.of(node) for node in (0, 1, 2)] == [checkpoint(0, 5), checkpoint(1, 3), None]
    assert (newest.folder_of(0), newest.folder_of(2)) == (NO_FOLDER, None)


def test_of_nodes_that_share_their_weights_the_newest_is_that_of_all() -> None:
    newest = NewestCheckpoints({0: checkpoint(0, 5), 1: checkpoint(1, 8)}, shares_weights=True)

    assert newest.of(0) == newest.of(2) == checkpoint(1, 8)


def test_after_a_rollback_no_newer_one_of_these_nodes_is_left() -> None:
    newest = NewestCheckpoints({0: checkpoint(0, 5), 1: checkpoint(1, 8)}, shares_weights=True)
    newest.roll_back({0, 1}, checkpoint(0, 4))

    assert newest.of(1) == checkpoint(0, 4)
