"""One node as the trainer drives it: what it is told, and what it then does."""

import itertools
from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest

from services.trainer.nodes.decisions import (
    Action,
    Applied,
    Closed,
    Feed,
    Halted,
    RequestSave,
    Restore,
    RollBack,
    SaveAbandoned,
    Skipped,
    Step,
    StepsAhead,
    WriteCheckpoint,
)
from services.trainer.nodes.node_training import NodeTraining
from services.trainer.nodes.rules import Rules
from services.trainer.nodes.saves import SAVE_DEADLINE_S
from services.trainer.nodes.stall_watch import STALLED_AFTER_S
from services.trainer.publication.losses import Losses
from services.trainer.publication.publishing import Evaluate, Publish, PublishingRules, Release
from shared.messages.training import (
    BatchReady,
    BatchStepped,
    MicrobatchEntered,
    SaveFailed,
    ShardSaved,
    StageEvent,
    StageReport,
    TrainingFailed,
    VersionsServed,
)
from shared.schedule import Feeding, ScheduleName
from tests.support.cluster import heartbeat


class Driver:
    """A node of two stages, and short ways of telling it things. Time stands still unless moved."""

    def __init__(self, *, checkpoint_every: int = 100, durable_version: int = 0, **rest: Any) -> None:
        rules = Rules(
            feeding=Feeding(schedule="async"),
            checkpoint_every=checkpoint_every,
            checkpoint_idle_s=2.0,
            **rest,
        )
        self.now_s = 0.0
        self.node = NodeTraining(
            0, 2, rules=rules, durable_version=durable_version, fences=itertools.count(1)
        )

    def beat(self, stage: int, *, instance: str = "a", ready: bool = True) -> list[Action]:
        beat = heartbeat(0, stage, num_stages=2, instance=instance, ready=ready)
        return self.node.heartbeat(beat, self.now_s)

    def open(self) -> "Driver":
        self.beat(0)
        self.beat(1)
        self.node.restored(self.node.life.fence, "", self.now_s)
        assert self.node.life.phase == "open"
        return self

    def tick(self, passed_s: float) -> list[Action]:
        """Let time pass, all stages alive."""
        self.now_s += passed_s
        self.beat(0)
        self.beat(1)
        return self.node.tick(self.now_s)

    def place(self, batch_id: str) -> list[Action]:
        return self.node.work.place(batch_id, self.now_s)

    def report(self, stage: int, event: StageEvent, *, fence: int | None = None) -> list[Action]:
        fence = self.node.life.fence if fence is None else fence
        return self.node.report(StageReport(node=0, stage=stage, fence=fence, event=event), self.now_s)

    def gather(self, batch_id: str, squared_norm: float = 1.0) -> list[Action]:
        """Stage 0 asks for the batch's step: no order that it has holds."""
        return self.report(0, BatchReady(batch_id=batch_id, squared_norm=squared_norm))

    def step(self, batch_id: str, version: int, loss: float = 1.0) -> list[Action]:
        """All stages have stepped."""
        return self.report(0, BatchStepped(batch_id=batch_id, version=version, loss=loss))

    def learn(self, batch_id: str) -> list[Action]:
        """The batch is placed and its gradients are gathered."""
        return self.place(batch_id) + self.gather(batch_id)

    def apply(self, batch_id: str, version: int) -> list[Action]:
        return self.learn(batch_id) + self.step(batch_id, version)

    def answer(self, version: int, refusals: dict[int, str] | None = None) -> list[Action]:
        return self.node.work.save_answered(version, refusals or {}, self.now_s)

    def saved(self, stage: int, version: int, *, num_bytes: int = 0) -> list[Action]:
        shard = ShardSaved(
            version=version, sha256_by_file={}, file_by_tensor={}, size_bytes=0, written_bytes=num_bytes
        )
        return self.report(stage, shard)

    def written(self, version: int, failure: str = "") -> list[Action]:
        return self.node.checkpoint_written(version, failure, self.now_s)


def test_a_node_is_restored_when_all_its_stages_are_ready_and_then_fed() -> None:
    driver = Driver()
    assert driver.beat(0) == []
    assert driver.beat(1, ready=False) == []
    assert driver.beat(1) == [Restore(1, 2)]
    assert driver.beat(1) == []
    assert driver.place("a") == []

    assert driver.node.restored(1, "", 0.0) == [Feed("a"), StepsAhead("a", 1)]


def test_batches_are_fed_ahead_and_their_steps_ordered_until_the_pipeline_and_one_more_is_full() -> None:
    driver = Driver().open()
    assert driver.place("a") == [Feed("a"), StepsAhead("a", 1)]
    assert driver.place("b") == [Feed("b"), StepsAhead("b", 2)]
    assert driver.place("c") == [Feed("c"), StepsAhead("c", 3)]  # two fill the pipeline of two stages
    assert driver.place("d") == []
    assert driver.node.work.num_wanted == 3

    assert driver.step("a", 1) == [Applied("a", 1, 1.0), Feed("d"), StepsAhead("d", 4)]


@pytest.mark.parametrize(("schedule", "num_fed"), [("1f1b", 2), ("gpipe", 2), ("async", 2)])
def test_one_batch_and_the_next_are_fed_where_a_batch_fills_the_pipeline(
    schedule: ScheduleName, num_fed: int
) -> None:
    rules = Rules(
        feeding=Feeding(schedule=schedule), microbatches=4, checkpoint_every=100, checkpoint_idle_s=2.0
    )
    assert rules.max_fed(2) == num_fed
    assert replace(rules, shares_weights=True).max_fed(2) == (2 if schedule == "async" else 1)


def test_a_batch_is_applied_when_all_stages_have_stepped() -> None:
    driver = Driver(durable_version=5).open()
    assert driver.place("a") == [Feed("a"), StepsAhead("a", 6)]

    assert driver.step("a", 6, 0.75) == [Applied("a", 6, 0.75)]


def test_a_question_that_crosses_an_order_given_ahead_needs_no_answer() -> None:
    driver = Driver().open()
    driver.place("a")

    assert driver.gather("a") == []
    assert driver.step("a", 1) == [Applied("a", 1, 1.0)]


def test_a_stage_that_was_restarted_gives_the_batches_back() -> None:
    driver = Driver().open()
    driver.place("a")
    driver.place("b")

    assert driver.beat(1, instance="new", ready=False) == [Closed("stage 1 was restarted", ("a", "b"))]
    assert driver.beat(1, instance="new") == [Restore(2, 2)]


def test_reports_of_an_earlier_life_are_ignored() -> None:
    driver = Driver().open()
    driver.place("a")
    driver.beat(1, instance="new")
    driver.node.restored(2, "", 0.0)
    driver.place("a")

    assert driver.report(0, TrainingFailed(batch_id="a", reason="old"), fence=1) == []
    assert driver.report(0, BatchStepped(batch_id="a", version=7, loss=1.0), fence=1) == []
    assert driver.node.life.phase == "open"


def test_a_late_answer_to_an_earlier_restore_is_ignored() -> None:
    driver = Driver()
    driver.beat(0)
    driver.beat(1)
    assert driver.beat(1, instance="new") == [Closed("stage 1 was restarted", ()), Restore(2, 2)]

    driver.node.restored(1, "", 0.0)

    assert driver.node.life.phase == "restoring"


def test_a_failed_restore_is_tried_again_at_the_next_heartbeat() -> None:
    driver = Driver()
    driver.beat(0)
    driver.beat(1)
    driver.place("a")

    assert driver.node.restored(1, "stage 1: no answer", 0.0) == [
        Closed("the restore failed: stage 1: no answer", ("a",))
    ]
    assert driver.beat(0) == [Restore(2, 2)]


def test_a_failed_computation_names_its_batch_and_restores_the_node() -> None:
    driver = Driver().open()
    driver.place("a")
    driver.place("b")

    assert driver.report(1, TrainingFailed(batch_id="a", reason="NaN")) == [
        Closed("stage 1 failed: NaN", ("a", "b"), failed="a"),
        Restore(2, 2),
    ]


def test_a_failure_that_is_not_the_batchs_fault_blames_none() -> None:
    driver = Driver().open()
    driver.place("a")

    failure = TrainingFailed(batch_id="a", reason="out of memory", is_batch_at_fault=False)
    assert driver.report(1, failure) == [Closed("stage 1 failed: out of memory", ("a",)), Restore(2, 2)]


def test_it_is_told_which_batch_found_no_memory() -> None:
    driver = Driver().open()
    driver.place("a")

    failure = TrainingFailed(batch_id="a", reason="no", is_batch_at_fault=False, lacks_memory=True)
    assert driver.report(1, failure) == [Closed("stage 1 failed: no", ("a",), unfit="a"), Restore(2, 2)]


def test_a_stage_at_another_version_than_it_should_be_restores_the_node() -> None:
    driver = Driver().open()
    driver.learn("a")

    actions = driver.step("a", 3)

    assert actions == [Closed("the node is at version 3 after a, not at 1", ("a",)), Restore(2, 2)]


def test_a_silent_stage_closes_the_node_until_it_speaks_again() -> None:
    driver = Driver().open()
    driver.place("a")
    driver.now_s = 3.5
    driver.beat(0)

    assert driver.node.tick(3.5) == [Closed("stages [1] are silent", ("a",))]
    assert driver.beat(0) == []
    assert driver.beat(1) == [Restore(2, 2)]


def test_a_node_that_reports_nothing_while_it_has_work_starts_again() -> None:
    driver = Driver().open()
    driver.place("a")
    assert driver.tick(STALLED_AFTER_S) == []
    driver.report(0, MicrobatchEntered(batch_id="a", index=0))
    assert driver.tick(1) == []

    assert driver.tick(STALLED_AFTER_S + 1)[0] == Closed(f"no report for {STALLED_AFTER_S:g} s", ("a",))


def test_a_step_beyond_a_version_that_is_to_be_saved_waits_until_every_stage_knows_of_it() -> None:
    driver = Driver(checkpoint_every=2).open()
    driver.apply("a", 1)
    assert driver.place("b") == [Feed("b"), StepsAhead("b", 2), RequestSave(1, 2, 2)]
    assert driver.place("c") == [Feed("c")]
    driver.step("b", 2)
    assert driver.place("d") == [Feed("d")]

    assert driver.gather("c") == []
    assert driver.answer(2) == [Step("c", 3), StepsAhead("d", 4)]


def test_a_version_that_is_to_be_saved_is_made_by_the_next_batch_when_one_is_skipped() -> None:
    driver = Driver(checkpoint_every=2).open()
    driver.apply("a", 1)
    driver.place("b")
    driver.place("c")
    driver.answer(2)

    assert driver.gather("b", nan) == [Step("b", 1, is_skipped=True), StepsAhead("c", 2)]
    driver.step("b", 1)
    driver.step("c", 2)
    driver.saved(0, 2)
    assert isinstance(driver.saved(1, 2)[0], WriteCheckpoint)


def test_when_no_batch_makes_the_version_that_is_to_be_saved_the_present_one_is() -> None:
    driver = Driver(checkpoint_every=2).open()
    driver.apply("a", 1)
    driver.place("b")
    driver.answer(2)
    driver.gather("b", nan)
    driver.step("b", 1)

    assert driver.tick(0) == []
    assert driver.tick(2) == [RequestSave(1, 1, 2)]
    driver.answer(1)
    driver.saved(0, 1)
    assert isinstance(driver.saved(1, 1)[0], WriteCheckpoint)


def test_a_save_is_not_late_while_its_batch_is_computed() -> None:
    driver = Driver(checkpoint_every=1).open()
    driver.place("a")
    driver.answer(1)
    for _ in range(12):
        assert driver.tick(SAVE_DEADLINE_S / 10) == []
        driver.report(0, MicrobatchEntered(batch_id="a", index=0))
    driver.step("a", 1)
    assert driver.tick(SAVE_DEADLINE_S - 1) == []

    assert isinstance(driver.tick(2)[0], SaveAbandoned)


def test_gradients_are_scaled_down_to_the_largest_norm_over_all_stages() -> None:
    driver = Driver(max_gradient_norm=1.0, checkpoint_every=1).open()
    driver.place("a")
    for batch_id, squared_norm in {"b": 25.0, "c": 0.25}.items():
        driver.place(batch_id)
        assert driver.gather(batch_id, squared_norm) == [], "no step may overtake the save"

    assert driver.answer(1) == [Step("b", 2, gradient_scale=1 / 5), Step("c", 3)]


@pytest.mark.parametrize("squared_norm", [nan, inf])
def test_a_batch_without_finite_gradients_is_skipped_and_those_after_it_are_ordered_anew(
    squared_norm: float,
) -> None:
    driver = Driver().open()
    driver.place("a")
    driver.place("b")

    assert driver.gather("a", squared_norm) == [Step("a", 0, is_skipped=True), StepsAhead("b", 1)]
    assert driver.step("a", 0, loss=3.0) == [Skipped("a", 3.0)]
    assert driver.step("b", 1) == [Applied("b", 1, 1.0)]


def test_a_node_whose_gradients_are_not_finite_again_and_again_trains_no_more_and_saves_what_it_has() -> None:
    driver = Driver(max_skips=2).open()
    driver.apply("good", 1)
    for batch_id in ("a", "b", "c"):
        driver.place(batch_id)
        if batch_id != "c":
            driver.gather(batch_id, nan)
    assert driver.step("a", 1) == [Skipped("a", 1.0)]
    *_, halted = driver.step("b", 1)
    assert halted == Halted("the gradients of 2 batches in a row were not finite")
    assert not driver.node.is_known
    assert driver.place("d") == []

    driver.step("c", 2)  # was on its way
    assert not driver.node.is_known
    driver.tick(0)
    assert driver.tick(2) == [RequestSave(1, 2, 2)]


def test_a_node_that_trains_no_more_gives_back_what_has_not_begun_and_ends_what_has() -> None:
    driver = Driver(max_skips=1).open()
    for batch_id in ("a", "b", "c", "d"):
        driver.place(batch_id)
    driver.gather("a", nan)

    *_, halted = driver.step("a", 0)

    assert isinstance(halted, Halted)
    assert halted.unfinished == ("d",), "b and c are fed"
    assert driver.step("b", 1) == [Applied("b", 1, 1.0)]


def test_one_batch_with_finite_gradients_is_enough_to_go_on() -> None:
    driver = Driver(max_skips=2).open()
    for batch_id, squared_norm in (("a", nan), ("b", 1.0), ("c", nan)):
        driver.place(batch_id)
        driver.gather(batch_id, squared_norm)
    driver.step("a", 0)
    driver.step("b", 1)
    driver.step("c", 1)

    assert driver.node.is_known


def test_a_checkpoint_is_written_when_all_shards_are_there_and_all_stages_have_stepped() -> None:
    driver = Driver(checkpoint_every=1).open()
    assert driver.learn("a")[-1] == RequestSave(1, 1, 2)
    driver.answer(1)
    assert driver.saved(1, 1) == []
    assert driver.saved(0, 1) == []  # it overtakes what stage 0 tells of the step

    actions = driver.step("a", 1)

    assert [type(action) for action in actions] == [Applied, WriteCheckpoint]
    assert driver.written(1) == []
    assert driver.node.durable_version == 1


@pytest.mark.parametrize("stage_1_says", ["refuses", "fails"])
def test_a_save_that_one_stage_does_not_do_ends_and_comes_again_at_the_next_batch(stage_1_says: str) -> None:
    driver = Driver(checkpoint_every=1).open()
    driver.learn("a")
    driver.answer(1, {1: "past it"} if stage_1_says == "refuses" else {})
    driver.step("a", 1)
    if stage_1_says == "fails":
        driver.report(1, SaveFailed(version=1, reason="past it"))

    assert driver.saved(0, 1) == [SaveAbandoned(1, "stage 1: past it")]
    assert driver.learn("b")[-1] == RequestSave(1, 2, 2)


def test_a_refused_save_does_not_hold_the_next_step_up() -> None:
    driver = Driver(checkpoint_every=1).open()
    driver.apply("a", 1)
    assert driver.learn("b") == [Feed("b")]

    abandoned, *steps = driver.answer(1, {0: "no", 1: "no"})

    assert abandoned == SaveAbandoned(1, "stage 0: no; stage 1: no")
    assert steps == [Step("b", 2), RequestSave(1, 2, 2)]


def test_an_idle_node_saves_what_it_has_learnt_and_tries_again_when_that_fails() -> None:
    driver = Driver().open()
    assert driver.tick(10) == []
    driver.apply("a", 1)
    assert driver.tick(0) == []
    assert driver.tick(1.9) == []
    assert driver.tick(0.2) == [RequestSave(1, 1, 2)]
    assert driver.answer(1, {0: "no", 1: "no"})[0] == SaveAbandoned(1, "stage 0: no; stage 1: no")
    assert driver.tick(0) == []
    assert driver.tick(2) == [RequestSave(1, 1, 2)]


def make_durable(driver: Driver, version: int, *, num_bytes: int) -> None:
    """Two stages write `num_bytes` each."""
    driver.answer(version)
    for stage in (0, 1):
        driver.saved(stage, version, num_bytes=num_bytes)
    driver.written(version)


def test_after_a_large_save_the_next_one_waits_until_its_bytes_are_within_the_bound() -> None:
    driver = Driver(checkpoint_bytes_per_s=10.0, checkpoint_every=3).open()
    driver.apply("a", 1)
    assert driver.tick(0) == []
    assert driver.tick(2) == [RequestSave(1, 1, 2)]  # at 2 s
    make_durable(driver, 1, num_bytes=50)
    driver.apply("b", 2)
    assert driver.tick(0) == []
    assert driver.tick(9) == []
    assert driver.tick(1) == [RequestSave(1, 2, 2)]  # 100 bytes have 10 s
    make_durable(driver, 2, num_bytes=50)
    for batch_id, version in (("c", 3), ("d", 4), ("e", 5)):
        driver.apply(batch_id, version)
    assert not any(isinstance(action, RequestSave) for action in driver.learn("f"))  # due since the third one
    driver.step("f", 6)
    driver.tick(1)
    driver.now_s += 9
    assert RequestSave(1, 7, 2) in driver.learn("g")


GUARDED = PublishingRules(serving="published", evaluate_every=2, max_kept=3)


def guarded(*, durable_version: int = 0, served: int | None = None, **rules: Any) -> Driver:
    """What serves has been evaluated."""
    driver = Driver(publishing=GUARDED, durable_version=durable_version, **rules)
    driver.beat(0)
    driver.beat(1)
    served_version = durable_version if served is None else served
    assert driver.node.restored(1, "", 0.0, served=served) == [Evaluate(served_version)]
    assert driver.node.work.publishing.evaluated(served_version, Losses(held_out=2.0)) == []
    return driver


def test_a_step_that_a_guard_will_look_at_is_given_ahead_kept_and_saved() -> None:
    driver = guarded()
    assert driver.place("a") == [Feed("a"), StepsAhead("a", 1)]
    assert driver.place("b") == [Feed("b"), StepsAhead("b", 2, is_kept=True), RequestSave(1, 2, 2)]


def test_a_step_is_not_given_ahead_while_a_guard_cannot_say_whether_it_will_look_at_it() -> None:
    driver = guarded()
    driver.apply("a", 1)
    driver.place("b")
    driver.answer(2)
    driver.place("c")
    assert driver.place("d") == [Feed("d")], "4 is due, and 2 is not evaluated yet"
    assert driver.step("b", 2) == [Applied("b", 2, 1.0), Evaluate(2)]

    driver.step("c", 3)
    assert driver.gather("d") == [Step("d", 4)]


def test_steps_are_given_ahead_where_the_bound_on_bytes_leaves_a_guard_no_version() -> None:
    driver = guarded(checkpoint_bytes_per_s=1.0)
    driver.apply("a", 1)
    driver.learn("b")
    make_durable_step(driver)
    for number, batch_id in enumerate("cdefgh", start=3):
        assert StepsAhead(batch_id, number) in driver.place(batch_id)
        driver.step(batch_id, number)
    driver.now_s = 1000.0
    assert StepsAhead("i", 9, is_kept=True) in driver.place("i")


def make_durable_step(driver: Driver) -> None:
    """Version 2 is saved, which takes a hundred bytes, and serves."""
    driver.step("b", 2)
    make_durable(driver, 2, num_bytes=50)
    driver.node.work.publishing.evaluated(2, Losses(held_out=1.0))


def test_a_kept_version_whose_batch_is_skipped_is_kept_when_the_next_makes_it() -> None:
    driver = Driver(publishing=PublishingRules(serving="pinned")).open()
    driver.place("a")
    driver.place("b")

    assert driver.gather("a", nan)[-1] == StepsAhead("b", 1, is_kept=True)
    assert driver.step("a", 0) == [Skipped("a", 1.0)]
    assert Publish(1) in driver.step("b", 1)


def test_pinned_a_step_is_given_ahead_as_soon_as_there_is_room_for_its_version() -> None:
    driver = Driver(publishing=PublishingRules(serving="pinned", max_kept=2)).open()
    assert driver.place("a") == [Feed("a"), StepsAhead("a", 1, is_kept=True)]
    assert driver.place("b") == [Feed("b")], "versions 0 and 1 are kept"
    assert driver.step("a", 1) == [Applied("a", 1, 1.0), Publish(1)]

    served = driver.report(0, VersionsServed(published=1, in_use=(1,)))

    assert served == [Release(0), StepsAhead("b", 2, is_kept=True)]


def test_pinned_without_room_the_step_is_made_and_its_version_not_kept() -> None:
    driver = Driver(publishing=PublishingRules(serving="pinned", max_kept=2)).open()
    driver.place("a")
    driver.place("b")

    assert driver.gather("b") == [Step("b", 2)]


def test_what_a_guard_evaluates_is_saved_too() -> None:
    driver = guarded()
    driver.apply("a", 1)
    assert driver.place("b")[-2:] == [StepsAhead("b", 2, is_kept=True), RequestSave(1, 2, 2)]
    driver.answer(2)
    assert driver.step("b", 2) == [Applied("b", 2, 1.0), Evaluate(2)]
    assert driver.node.work.publishing.evaluated(2, Losses(held_out=1.0)) == [Publish(2)]


def test_a_guard_evaluates_no_version_that_cannot_be_saved_and_the_next_that_can() -> None:
    driver = guarded()
    driver.apply("a", 1)
    assert driver.tick(0) == []
    assert driver.tick(2) == [RequestSave(1, 1, 2)]
    driver.answer(1)
    assert driver.learn("b")[-1:] == [Step("b", 2)]
    driver.step("b", 2)
    driver.saved(0, 1)
    assert isinstance(driver.saved(1, 1)[0], WriteCheckpoint)
    assert driver.written(1) == []

    assert driver.place("c")[-2:] == [StepsAhead("c", 3, is_kept=True), RequestSave(1, 3, 2)]


def test_a_durable_version_that_serves_is_not_saved_again_when_a_batch_is_skipped() -> None:
    driver = guarded(durable_version=2)
    driver.place("a")

    assert driver.gather("a", nan) == [Step("a", 2, is_skipped=True)]


def test_after_a_restore_an_older_version_may_serve_than_the_one_that_trains_on() -> None:
    driver = guarded(durable_version=8, served=4)
    assert (driver.node.version, driver.node.work.publishing.published) == (8, 4)
    assert driver.place("a")[-2:] == [StepsAhead("a", 9, is_kept=True), RequestSave(1, 9, 2)]


def test_no_step_may_overtake_a_save_of_an_idle_node() -> None:
    driver = Driver().open()
    driver.apply("a", 1)
    driver.tick(0)
    driver.tick(2)

    assert driver.learn("b") == [Feed("b")]
    assert driver.answer(1) == [Step("b", 2)]


def test_a_save_that_never_ends_is_given_up() -> None:
    driver = Driver(checkpoint_every=1).open()
    driver.apply("a", 1)
    driver.answer(1)

    assert driver.tick(SAVE_DEADLINE_S + 1)[0] == SaveAbandoned(
        1, f"not written within {SAVE_DEADLINE_S:g} s"
    )


@pytest.mark.parametrize("failure", ["", "disk full"])
def test_a_node_closes_only_when_it_is_known_whether_its_checkpoint_is_durable(failure: str) -> None:
    driver = Driver(checkpoint_every=1).open()
    driver.apply("a", 1)
    driver.answer(1)
    driver.saved(0, 1)
    assert isinstance(driver.saved(1, 1)[0], WriteCheckpoint)

    assert driver.beat(0, instance="new") == []
    assert not driver.node.is_known
    actions = driver.written(1, failure)

    assert actions[-2:] == [Closed("stage 0 was restarted", ()), Restore(2, 2)]
    assert driver.node.version == driver.node.durable_version == (0 if failure else 1)


def test_an_answer_to_a_save_of_an_earlier_life_is_ignored() -> None:
    driver = Driver(checkpoint_every=1).open()
    driver.learn("a")
    driver.beat(0, instance="new")
    driver.node.restored(2, "", 0.0)
    assert driver.learn("a")[-1] == RequestSave(2, 1, 2)
    driver.step("a", 1)
    driver.learn("b")

    assert driver.node.in_life(1, lambda work: work.save_answered(1, {0: "gone"}, 0.0)) == []
    assert driver.answer(1) == [Step("b", 2)]


def test_a_node_that_goes_back_stays_closed_until_it_is_there() -> None:
    driver = Driver(durable_version=8).open()
    driver.apply("a", 9)
    driver.place("b")

    assert driver.node.roll_back(4) == [RollBack(4, ("b",))]
    assert driver.tick(1.0) == []
    assert not driver.node.is_known

    assert driver.node.rolled_back("") == [Restore(2, 2)]
    assert (driver.node.version, driver.node.durable_version) == (4, 4)
    driver.node.restored(2, "", driver.now_s)
    assert driver.learn("c")[-1] == StepsAhead("c", 5)


def test_a_rollback_waits_for_the_manifest_that_is_being_written() -> None:
    driver = Driver(checkpoint_every=1).open()
    driver.learn("a")
    driver.answer(1)
    for stage in (0, 1):
        driver.saved(stage, 1)
    assert isinstance(driver.step("a", 1)[-1], WriteCheckpoint)

    assert driver.node.roll_back(0) == []
    assert driver.written(1) == [RollBack(0, ())]
    assert driver.node.rolled_back("") == [Restore(2, 2)]
    assert driver.node.durable_version == 0


def test_a_node_goes_back_to_a_version_whose_manifest_is_just_being_written() -> None:
    driver = Driver(checkpoint_every=1).open()
    driver.learn("a")
    driver.answer(1)
    for stage in (0, 1):
        driver.saved(stage, 1)
    driver.step("a", 1)

    assert driver.node.roll_back(1) == []
    assert driver.written(1) == [RollBack(1, ())]


def test_a_node_whose_stages_are_gone_goes_back_too() -> None:
    driver = Driver(durable_version=8).open()
    driver.node.tick(60.0)
    assert driver.node.life.phase == "closed"

    assert driver.node.roll_back(4) == [RollBack(4, ())]
    assert driver.node.rolled_back("") == []
    driver.beat(0)
    assert driver.beat(1) == [Restore(2, 2)]


def test_a_rollback_that_the_disk_refuses_gives_back_what_was_applied() -> None:
    driver = Driver(durable_version=8).open()
    driver.apply("a", 9)
    driver.node.roll_back(4)

    assert driver.node.rolled_back("no space left") == [
        Closed("no rollback: no space left", ()),
        Restore(2, 2),
    ]
    assert driver.node.version == 8


def test_a_halted_node_trains_again_after_a_rollback() -> None:
    driver = Driver(durable_version=8, max_skips=1).open()
    driver.place("a")
    driver.gather("a", nan)
    driver.step("a", 8)
    assert driver.node.work.gate.halt_reason

    driver.node.roll_back(4)
    driver.node.rolled_back("")

    assert driver.node.is_known


def test_a_connection_that_was_lost_starts_anew_what_was_on_its_way() -> None:
    driver = Driver().open()
    assert driver.node.messages_lost() == [], "nothing was"
    driver.place("a")

    (closed, restore) = driver.node.messages_lost()
    assert closed == Closed("messages may have been lost with the connection", ("a",))
    assert restore == Restore(2, 2)
    assert driver.node.messages_lost()[-1] == Restore(3, 2), "the restore may be lost, too"


def test_a_save_whose_answers_may_be_lost_is_given_up() -> None:
    driver = Driver(checkpoint_every=1).open()
    driver.apply("a", 1)
    abandoned, closed, restore = driver.node.messages_lost()
    assert isinstance(abandoned, SaveAbandoned)
    assert closed == Closed("messages may have been lost with the connection", ())
    assert restore == Restore(2, 2)
