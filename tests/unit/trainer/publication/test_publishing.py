"""Which versions are kept, evaluated, published and released."""

from math import inf, nan
from typing import Any

import pytest

from services.trainer.publication.evaluation_turns import REST_S
from services.trainer.publication.losses import Losses
from services.trainer.publication.publishing import (
    Evaluate,
    Keep,
    Publish,
    Publishing,
    PublishingRules,
    Release,
    Withheld,
)
from shared.messages.training import VersionsServed


def pinned(**rules: Any) -> Publishing:
    """Stages hold version 0."""
    publishing = Publishing(PublishingRules(**{"serving": "pinned", "max_kept": 4, **rules}))
    assert publishing.restored(0) == []
    return publishing


def guarded(*, loss: float | None = 2.0, **rules: Any) -> Publishing:
    """Version 0 is served, and has been evaluated."""
    given = {"serving": "published", "evaluate_every": 4, "max_rise": 0.1, **rules}
    publishing = Publishing(PublishingRules(**given))
    assert publishing.restored(0) == [Evaluate(0)]
    losses = None if loss is None else Losses(held_out=loss)
    assert publishing.evaluated(0, losses) == []
    return publishing


def steps(publishing: Publishing, first: int, last: int) -> list[Any]:
    """Steps to these versions; the actions of all."""
    actions: list[Any] = []
    for version in range(first, last + 1):
        publishing.begin_keeping(version)
        actions += publishing.applied(version)
    return actions


def served(published: int, *in_use: int) -> VersionsServed:
    return VersionsServed(published=published, in_use=in_use)


def test_the_newest_weights_need_no_publishing() -> None:
    publishing = Publishing(PublishingRules())
    assert publishing.restored(0) == []
    assert not publishing.begin_keeping(1)
    assert publishing.applied(1) == []
    assert publishing.published is None


def test_an_order_that_does_not_hold_leaves_its_version_to_the_next() -> None:
    publishing = pinned()
    publishing.begin_keeping(1)
    publishing.begin_keeping(2)
    publishing.revoke_from(1)

    assert publishing.applied(1) == []
    assert publishing.begin_keeping(2)
    assert publishing.applied(2) == [Publish(2)]


def test_an_evaluation_whose_version_does_not_come_is_due_again() -> None:
    publishing = guarded()
    assert publishing.begin_keeping(4)
    publishing.revoke_from(4)

    assert publishing.begin_keeping(4)
    assert publishing.applied(4) == [Evaluate(4)]


def test_pinned_every_version_is_published_when_all_stages_have_it() -> None:
    publishing = pinned()
    assert publishing.begin_keeping(1)
    assert publishing.published == 0
    assert publishing.applied(1) == [Publish(1)]
    assert publishing.published == 1


def test_no_more_versions_are_kept_than_may_be_and_training_goes_on() -> None:
    publishing = pinned(max_kept=3)
    assert steps(publishing, 1, 5) == [Publish(1), Publish(2)]
    assert publishing.served(served(2, 1, 2)) == [Release(0)]
    assert publishing.begin_keeping(6)
    assert publishing.applied(6) == [Publish(6)]
    assert not publishing.begin_keeping(7)


def test_what_no_request_uses_is_released_but_neither_the_served_nor_a_coming_one() -> None:
    publishing = pinned()
    steps(publishing, 1, 2)
    assert publishing.begin_keeping(3)
    assert publishing.served(served(2)) == [Release(0), Release(1)]
    assert publishing.served(served(2)) == []
    assert publishing.applied(3) == [Publish(3)]


def test_a_publication_that_was_lost_is_told_again() -> None:
    publishing = pinned()
    steps(publishing, 1, 1)
    assert publishing.served(served(0, 0)) == [Publish(1)]


def test_after_a_restore_nothing_of_before_counts() -> None:
    publishing = pinned(max_kept=2)
    steps(publishing, 1, 1)
    assert not publishing.begin_keeping(2)
    publishing.restored(0)
    assert publishing.published == 0
    assert publishing.begin_keeping(1)


def test_a_closed_node_publishes_nothing() -> None:
    publishing = guarded()
    assert publishing.begin_keeping(4)
    publishing.applied(4)
    publishing.closed()
    assert publishing.evaluated(4, Losses(held_out=1.0)) == []
    assert publishing.served(served(0)) == []
    assert not publishing.begin_keeping(5)


def test_guarded_a_version_is_evaluated_every_so_many_steps_and_then_published() -> None:
    publishing = guarded()
    assert steps(publishing, 1, 6) == [Evaluate(4)]
    assert publishing.published == 0
    assert publishing.evaluated(4, Losses(held_out=2.2)) == [Publish(4)]
    assert publishing.served(served(4, 4)) == [Release(0)]
    assert steps(publishing, 7, 9) == [Evaluate(8)]


@pytest.mark.parametrize("loss", [2.21, nan])
def test_guarded_a_worse_version_is_withheld(loss: float) -> None:
    publishing = guarded()
    steps(publishing, 1, 4)
    withheld, release = publishing.evaluated(4, Losses(held_out=loss))
    assert isinstance(withheld, Withheld)
    assert withheld.version == 4
    assert withheld.reason == f"held-out loss {loss:.4f} is above 2.2000"
    assert release == Release(4)
    assert (publishing.published, publishing.num_withheld) == (0, 1)
    assert steps(publishing, 5, 8) == [Evaluate(8)]
    assert publishing.evaluated(8, Losses(held_out=1.0)) == [Publish(8)]


def test_guarded_small_rises_do_not_add_up() -> None:
    publishing = guarded(loss=2.0)
    for version, loss in ((4, 2.1), (8, 2.19)):
        steps(publishing, version - 3, version)
        assert publishing.evaluated(version, Losses(held_out=loss)) == [Publish(version)]
        publishing.served(served(version, version))
    steps(publishing, 9, 12)
    withheld, release = publishing.evaluated(12, Losses(held_out=2.25))
    assert (withheld, release) == (Withheld(12, "held-out loss 2.2500 is above 2.2000"), Release(12))


def test_guarded_small_rises_do_not_add_up_over_a_restart_whatever_the_examples_are_then() -> None:
    publishing = guarded(loss=2.0)
    steps(publishing, 1, 4)
    assert publishing.evaluated(4, Losses(held_out=2.1)) == [Publish(4)]
    rise = publishing.limits.rise(2.1)
    publishing.restored(4, rise=rise)
    assert publishing.evaluated(4, Losses(held_out=4.2)) == []
    assert publishing.limits.rise(4.2) == pytest.approx(rise)
    steps(publishing, 5, 8)
    assert publishing.evaluated(8, Losses(held_out=4.41))[0] == Withheld(
        8, "held-out loss 4.4100 is above 4.4000"
    )


def test_guarded_what_is_known_of_a_restored_version_stays_until_it_could_be_evaluated() -> None:
    publishing = guarded()
    publishing.restored(0, rise=1.25)
    assert publishing.evaluated(0, None) == []
    steps(publishing, 1, 4)
    publishing.evaluated(0, Losses(held_out=2.0))
    assert publishing.limits.rise(2.0) == pytest.approx(1.25)


@pytest.mark.parametrize("served_loss", [nan, inf])
def test_guarded_any_number_is_better_than_a_served_version_without_one(
    served_loss: float,
) -> None:
    publishing = guarded(loss=served_loss)
    assert publishing.limits.rise(served_loss) == 1.0
    steps(publishing, 1, 4)
    assert isinstance(publishing.evaluated(4, Losses(held_out=inf))[0], Withheld)
    steps(publishing, 5, 8)
    assert publishing.evaluated(8, Losses(held_out=5.0)) == [Publish(8)]
    assert publishing.limits.rise(5.0) == 1.0


def test_guarded_periods_are_counted_from_what_is_served_whatever_is_trained_on() -> None:
    publishing = guarded()
    publishing.restored(8)
    publishing.evaluated(8, Losses(held_out=2.0))
    assert not publishing.begin_keeping(11)
    assert publishing.begin_keeping(15), "12 is over: training goes on from a later version"
    assert publishing.applied(15) == [Evaluate(15)]
    assert publishing.evaluated(15, Losses(held_out=9.0))[0] == Withheld(
        15, "held-out loss 9.0000 is above 2.2000"
    )
    assert publishing.published == 8


def test_guarded_what_serves_or_may_yet_is_wanted_in_a_checkpoint() -> None:
    publishing = guarded()
    assert [version for version in range(6) if publishing.wants_saved(version)] == [0]
    assert publishing.begin_keeping(4)
    assert publishing.wants_saved(4)
    steps(publishing, 4, 4)
    publishing.evaluated(4, Losses(held_out=9.0))
    assert not publishing.wants_saved(4)
    assert not pinned().wants_saved(0), "without a guard whatever is newest serves"


def test_guarded_an_evaluation_that_finds_no_room_comes_as_soon_as_there_is() -> None:
    publishing = guarded(max_kept=2)
    steps(publishing, 1, 4)
    publishing.evaluated(4, Losses(held_out=1.0))
    assert steps(publishing, 5, 9) == [], "0 and 4 are kept"
    assert publishing.served(served(4, 4)) == [Release(0)]
    assert steps(publishing, 10, 10) == [Evaluate(10)]


def test_guarded_one_version_is_evaluated_at_a_time() -> None:
    publishing = guarded()
    steps(publishing, 1, 4)
    assert steps(publishing, 5, 9) == []
    publishing.evaluated(4, Losses(held_out=1.0))
    publishing.served(served(4, 4))
    assert steps(publishing, 10, 10) == [Evaluate(10)]


def test_guarded_nothing_is_published_before_there_is_something_to_compare_with() -> None:
    publishing = guarded(loss=None)
    assert steps(publishing, 1, 4) == [Evaluate(0)]
    assert publishing.evaluated(0, Losses(held_out=2.0)) == []
    assert steps(publishing, 5, 8) == [Evaluate(8)]


def test_guarded_a_version_whose_evaluation_came_to_nothing_is_not_served() -> None:
    publishing = guarded()
    steps(publishing, 1, 4)
    assert publishing.evaluated(4, None) == [Release(4)]
    assert (publishing.published, publishing.num_withheld) == (0, 0)


def test_guarded_results_of_other_versions_are_ignored() -> None:
    publishing = guarded()
    assert publishing.evaluated(3, Losses(held_out=0.1)) == []
    assert publishing.losses == {0: Losses(held_out=2.0)}


@pytest.mark.parametrize(("rise", "is_served"), [(0.5, True), (0.51, False), (nan, False), (inf, False)])
def test_guarded_a_version_is_withheld_for_what_the_model_wrote_itself(rise: float, is_served: bool) -> None:
    publishing = guarded(max_samples_rise=0.5)
    steps(publishing, 1, 4)
    first, *_ = publishing.evaluated(4, Losses(held_out=1.0, samples=3.0, samples_rise=rise))
    assert first == Publish(4) if is_served else isinstance(first, Withheld)
    assert is_served or "own samples" in first.reason


def test_guarded_the_newest_version_is_evaluated_at_rest() -> None:
    publishing = guarded()
    steps(publishing, 1, 2)
    assert publishing.at_rest(2, 0.0) == [Keep(2)]
    assert publishing.at_rest(2, 0.0) == []
    assert publishing.kept(2, is_kept=True) == [Evaluate(2)]
    assert publishing.wants_saved(2)
    assert publishing.evaluated(2, Losses(held_out=1.0)) == [Publish(2)]
    assert publishing.at_rest(2, 0.0) == []
    publishing.served(served(2, 2))
    assert steps(publishing, 3, 9) == [Evaluate(6)]


def test_guarded_what_was_withheld_is_not_evaluated_again_at_rest() -> None:
    publishing = guarded()
    steps(publishing, 1, 4)
    publishing.evaluated(4, Losses(held_out=9.0))
    assert publishing.at_rest(4, 0.0) == []
    publishing.restored(0, newest_tried=4)
    publishing.evaluated(0, Losses(held_out=2.0))
    assert publishing.at_rest(4, 0.0) == []
    publishing.restored(0, newest_tried=0)
    publishing.evaluated(0, Losses(held_out=2.0))
    assert publishing.at_rest(4, 0.0) == [Keep(4)], "it was never evaluated"


def test_guarded_a_version_that_not_every_stage_keeps_at_rest_is_let_go() -> None:
    publishing = guarded()
    publishing.at_rest(2, 0.0)
    assert publishing.kept(2, is_kept=False) == [Release(2)]
    assert publishing.kept(2, is_kept=True) == []


def test_guarded_what_came_to_nothing_at_rest_is_tried_again_after_a_while() -> None:
    publishing = guarded()
    publishing.at_rest(2, 0.0)
    publishing.kept(2, is_kept=False)
    assert publishing.at_rest(2, 10.0) == publishing.at_rest(2, 10.0 + REST_S / 2) == []
    assert publishing.at_rest(2, 10.0 + REST_S) == [Keep(2)]
    publishing.kept(2, is_kept=True)
    assert publishing.evaluated(2, None) == [Release(2)]
    assert publishing.turns.newest_judged == 0
    assert publishing.at_rest(2, 100.0) == []
    assert publishing.at_rest(2, 100.0 + REST_S) == [Keep(2)]


def test_guarded_what_serves_is_evaluated_at_rest_if_it_could_not_be_before() -> None:
    publishing = guarded(loss=None)
    assert publishing.at_rest(2, 0.0) == []
    assert publishing.at_rest(2, REST_S) == [Evaluate(0)]
    publishing.evaluated(0, Losses(held_out=2.0))
    assert publishing.at_rest(2, REST_S) == [Keep(2)]


def test_guarded_a_verdict_on_weights_that_are_gone_is_forgotten() -> None:
    publishing = guarded()
    steps(publishing, 1, 4)
    publishing.evaluated(4, Losses(held_out=9.0))
    assert (publishing.turns.newest_judged, publishing.last_withheld.version) == (4, 4)
    publishing.restored(0, newest_tried=4)
    assert (publishing.turns.newest_judged, publishing.last_withheld.version) == (4, 4)
    publishing.restored(2)
    assert (publishing.turns.newest_judged, publishing.last_withheld) == (2, None)


def test_guarded_a_version_made_again_by_another_batch_is_evaluated_at_rest() -> None:
    publishing = guarded()
    publishing.begin_keeping(4)
    publishing.revoke_from(4)
    assert publishing.at_rest(4, 0.0) == [Keep(4)]


def test_guarded_when_the_held_out_examples_become_others_what_serves_is_evaluated_on_them_first() -> None:
    publishing = guarded(loss=2.0)
    steps(publishing, 1, 4)
    assert publishing.evaluated(4, Losses(held_out=9.0, num_held_out=16)) == [Release(4)]
    assert (publishing.published, publishing.last_withheld) == (0, None)
    assert steps(publishing, 5, 5) == [Evaluate(0)]
    assert publishing.evaluated(0, Losses(held_out=8.5, num_held_out=16)) == []
    assert steps(publishing, 6, 9) == [Evaluate(9)]
    assert publishing.evaluated(9, Losses(held_out=9.0, num_held_out=16)) == [Publish(9)]


def test_guarded_at_rest_both_are_evaluated_on_the_new_examples() -> None:
    publishing = Publishing(PublishingRules(serving="published", evaluate_every=4))
    publishing.restored(0)
    publishing.evaluated(0, Losses())
    assert publishing.at_rest(2, now_s=REST_S) == [Keep(2)]
    assert publishing.kept(2, True) == [Evaluate(2)]
    assert publishing.evaluated(2, Losses(held_out=1.0, num_held_out=16)) == [Release(2)]
    assert publishing.at_rest(2, now_s=REST_S) == [Evaluate(0)]
    publishing.evaluated(0, Losses(held_out=2.0, num_held_out=16))
    assert publishing.at_rest(2, now_s=REST_S) == [Keep(2)]
    assert publishing.kept(2, True) == [Evaluate(2)]
    assert publishing.evaluated(2, Losses(held_out=1.0, num_held_out=16)) == [Publish(2)]


def test_guarded_rises_do_not_add_up_when_the_examples_become_others() -> None:
    publishing = guarded(loss=2.0)
    steps(publishing, 1, 4)
    publishing.evaluated(4, Losses(held_out=2.2))
    publishing.served(served(4, 4))
    steps(publishing, 5, 8)
    publishing.evaluated(8, Losses(held_out=1.0, num_held_out=16))
    assert steps(publishing, 9, 9) == [Evaluate(4)]
    publishing.evaluated(4, Losses(held_out=4.4, num_held_out=16))
    steps(publishing, 10, 13)
    withheld, _ = publishing.evaluated(13, Losses(held_out=4.5, num_held_out=16))
    assert withheld == Withheld(13, "held-out loss 4.5000 is above 4.4000")
