"""What checkpoints say, and what a run goes on from."""

import pytest

from services.trainer.checkpoints.manifests import (
    Verdict,
    all_apart,
    ledger_of,
    only_newest,
    rolled_back,
    served_instead,
)
from services.trainer.publication.losses import Losses
from shared import checkpoints
from shared.checkpoints import Checkpoint
from shared.errors import ConfigurationError
from shared.messages.weights import SavedWeights
from tests.unit.trainer.support import NO_FOLDER, checkpoints_of, manifest


def test_the_newest_that_may_serve_serves_instead_of_a_newer_one() -> None:
    assert served_instead(checkpoints.serving(checkpoints_of(3, 5, 4)), 5) is None
    assert served_instead(checkpoints.serving(checkpoints_of(3, 5, 4, withheld=(5,))), 5) == SavedWeights(
        version=4, checkpoint="4", digest=manifest(4).digest
    )


def test_a_checkpoint_is_known_by_what_its_files_contain() -> None:
    one = manifest(4, sha256_by_file={"a": "1", "b": "2"}, may_serve=False)
    noted = Verdict(4, Losses(held_out=1.5), may_serve=True).noted_in(one)
    again = manifest(4, sha256_by_file={"b": "2", "a": "1"}, created_wall_s=9.0)
    other = manifest(4, sha256_by_file={"a": "1", "b": "3"})

    assert one.digest == noted.digest == again.digest != other.digest


def test_of_several_verdicts_on_one_version_the_lowest_loss_counts_and_whoever_lets_it_serve() -> None:
    noted = manifest(8, may_serve=False)
    for verdict in (
        Verdict(8, Losses(held_out=1.0), may_serve=True, rise=1.04),
        Verdict(8, Losses(held_out=1.0), may_serve=False, rise=1.2),
        Verdict(8, Losses(held_out=1.0), may_serve=True, rise=1.0),
    ):
        noted = verdict.noted_in(noted)
    assert (noted.may_serve, noted.held_out_rise) == (True, 1.2)


def test_the_model_as_it_was_before_training_may_always_serve() -> None:
    assert served_instead(checkpoints.serving([]), 0) is None
    assert served_instead(checkpoints.serving(checkpoints_of(5, withheld=(5,))), 5) == SavedWeights(
        version=0, checkpoint=""
    )


def test_who_goes_back_to_a_version_lets_it_serve_and_has_later_ones_compared_with_it() -> None:
    withheld = manifest(3, may_serve=False, held_out_rise=1.3)
    back = rolled_back(withheld, ledger_of([Checkpoint(withheld, NO_FOLDER)]), merge="none")

    assert (back.may_serve, back.held_out_rise) == (True, 1.0)


@pytest.mark.parametrize(("merges", "expected"), [(("average", "average"), {1}), (("none",), {0})])
def test_nodes_that_share_their_weights_go_on_from_the_newest(
    merges: tuple[str, ...], expected: set[int]
) -> None:
    found = {
        node: Checkpoint(manifest(3 + node, node=node, merge=merge), NO_FOLDER)
        for node, merge in enumerate(merges)
    }
    assert set(only_newest(found)) == expected


def test_nodes_that_were_trained_apart_are_not_taken_for_one() -> None:
    with pytest.raises(ConfigurationError, match=r"nodes \[0, 1\] of this run were trained apart"):
        only_newest({node: Checkpoint(manifest(1, node=node), NO_FOLDER) for node in (0, 1)})


@pytest.mark.parametrize("merge", ["average", "outer", "allreduce"])
def test_nodes_that_shared_their_weights_do_not_go_on_apart(merge: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"share their weights \({merge}\)"):
        all_apart({0: Checkpoint(manifest(1, merge=merge), NO_FOLDER)})


def test_nodes_that_train_apart_go_on_each_from_its_own() -> None:
    found = {node: Checkpoint(manifest(1, node=node), NO_FOLDER) for node in (0, 1)}
    assert all_apart(found) == found
