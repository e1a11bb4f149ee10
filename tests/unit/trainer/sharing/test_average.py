"""Nodes whose weights become one: what is decided for them together, event by event."""

import itertools
from collections.abc import Iterator
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
    StepsAhead,
)
from services.trainer.nodes.node_training import NodeTraining
from services.trainer.nodes.rules import Rules
from services.trainer.publication.losses import Losses
from services.trainer.publication.publishing import Evaluate, Publish, PublishingRules
from services.trainer.sharing.average import MAX_FAILURES, Merges
from services.trainer.sharing.decisions import Decision, Joins, Member, Merge, NodeActions, Shared
from shared.messages.training import (
    BatchReady,
    BatchStepped,
    ShardSaved,
    StageEvent,
    StageReport,
)
from shared.schedule import Feeding
from tests.support.cluster import heartbeat


class Replicas:
    """Nodes of one stage each, and whoever decides for them together. Keeps what was decided."""

    def __init__(self, num_nodes: int, decides: Any, **rules: Any) -> None:
        fences: Iterator[int] = itertools.count(1)
        self.now_s = 0.0
        self.decides = decides
        self.decided: list[Decision] = []
        self.nodes = {
            number: NodeTraining(
                number,
                1,
                rules=Rules(
                    feeding=Feeding(schedule="1f1b"),
                    checkpoint_every=1000,
                    checkpoint_idle_s=2.0,
                    shares_weights=True,
                    **rules,
                ),
                durable_version=0,
                fences=fences,
            )
            for number in range(num_nodes)
        }

    def decide(self) -> list[Decision]:
        """What is decided now, until nothing is."""
        found: list[Decision] = []
        while decisions := self.decides.decide(self.nodes, self.now_s):
            found += decisions
        self.decided += found
        return found

    def beat(self, node: int, instance: str = "a") -> list[Action]:
        beat = heartbeat(node, 0, num_stages=1, instance=instance)
        return self.nodes[node].heartbeat(beat, self.now_s)

    def open(self, *numbers: int) -> "Replicas":
        for number in numbers or self.nodes:
            self.beat(number)
        self.decide()
        for number in numbers or self.nodes:
            self.restored(number)
        return self

    def restored(self, number: int) -> None:
        node = self.nodes[number]
        node.restored(node.life.fence, "", self.now_s)
        assert node.life.phase == "open"

    def report(self, node: int, event: StageEvent) -> list[Action]:
        report = StageReport(node=node, stage=0, fence=self.nodes[node].life.fence, event=event)
        return self.nodes[node].report(report, self.now_s)

    def learn(self, node: int, batch_id: str, squared_norm: float = 1.0) -> list[Action]:
        """A batch is placed, and its gradients are there."""
        actions = self.nodes[node].work.place(batch_id, self.now_s)
        return actions + self.report(node, BatchReady(batch_id=batch_id, squared_norm=squared_norm))

    def apply(self, node: int, batch_id: str, version: int) -> list[Action]:
        self.learn(node, batch_id)
        return self.report(node, BatchStepped(batch_id=batch_id, version=version, loss=1.0))

    def save(self, node: int, version: int, failure: str = "", *, num_bytes: int = 0) -> None:
        """The checkpoint that was asked for is written."""
        it = self.nodes[node]
        it.work.save_answered(version, {}, self.now_s)
        shard = ShardSaved(
            version=version, sha256_by_file={}, file_by_tensor={}, size_bytes=0, written_bytes=num_bytes
        )
        self.report(node, shard)
        it.checkpoint_written(version, failure, self.now_s)


def averaging(num_nodes: int = 2, *, every: int = 2, **rules: Any) -> Replicas:
    names = (f"merge-{number}" for number in itertools.count())
    return Replicas(num_nodes, Merges(every=every, idle_s=2.0, new_name=lambda: next(names)), **rules)


def merged(replicas: Replicas, name: str = "merge-0", failure: str = "") -> list[Decision]:
    decisions: list[Decision] = replicas.decides.merged(name, failure, replicas.nodes, replicas.now_s)
    return decisions + replicas.decide()


def test_nodes_join_with_the_newest_checkpoint_of_any() -> None:
    replicas = averaging()
    replicas.nodes[1].work.saves.adopt(5)
    replicas.beat(0)

    joins, told = replicas.decide()

    assert joins == Joins(0)
    assert isinstance(told, NodeActions)
    assert told.actions == (Restore(1, 1),)
    assert replicas.nodes[0].version == 5


def test_after_enough_batches_all_hold_merge_by_their_share_save_once_and_go_on() -> None:
    replicas = averaging().open()
    replicas.apply(0, "a", 1)
    replicas.apply(0, "b", 2)
    replicas.apply(0, "c", 3)
    assert replicas.decide() == []
    replicas.learn(1, "d")  # its step is on its way
    replicas.nodes[1].work.place("e", 0.0)
    replicas.report(1, BatchStepped(batch_id="d", version=1, loss=1.0))

    # Node 1 has begun e meanwhile: the merge waits for it.
    assert replicas.decide() == []
    assert replicas.nodes[0].work.place("f", 0.0) == []
    replicas.report(1, BatchReady(batch_id="e", squared_norm=1.0))
    replicas.report(1, BatchStepped(batch_id="e", version=2, loss=1.0))
    assert replicas.decide() == [Merge("merge-0", 5, (Member(0, 1, 1, 3 / 5), Member(1, 2, 1, 2 / 5)))]

    shared, *nothing, told = merged(replicas)
    assert shared == Shared((0, 1))
    assert nothing == [NodeActions(0, ()), NodeActions(1, ())]
    assert isinstance(told, NodeActions)
    assert told.actions == (RequestSave(1, 5, 1),)
    assert {node.version for node in replicas.nodes.values()} == {5}

    replicas.save(0, 5)
    released = [decision.actions for decision in replicas.decide() if isinstance(decision, NodeActions)]
    assert released == [(Feed("f"), StepsAhead("f", 6)), ()]
    assert {node.durable_version for node in replicas.nodes.values()} == {5}


def test_a_merge_waits_until_the_bytes_of_the_last_ones_checkpoint_are_within_the_bound() -> None:
    replicas = averaging(every=1, checkpoint_bytes_per_s=10.0).open()
    for node in (0, 1):
        replicas.apply(node, f"a{node}", 1)
    assert isinstance(replicas.decide()[-1], Merge)
    merged(replicas)
    replicas.save(0, 2, num_bytes=100)
    replicas.decide()
    for node in (0, 1):
        replicas.apply(node, f"b{node}", 3)
    replicas.now_s = 9.0
    assert replicas.decide() == []
    assert not any(node.work.gate.is_paused for node in replicas.nodes.values())
    replicas.now_s = 10.0
    assert isinstance(replicas.decide()[-1], Merge)


def test_without_work_nodes_merge_what_they_have() -> None:
    replicas = averaging(every=100).open()
    replicas.apply(1, "a", 1)
    assert replicas.decide() == []
    replicas.now_s = 1.9
    assert replicas.decide() == []
    replicas.now_s = 2.0

    assert replicas.decide() == [Merge("merge-0", 1, (Member(0, 1, 1, 0.0), Member(1, 2, 1, 1.0)))]


@pytest.mark.parametrize("what", ["leaves", "leaves before the save", "does not merge"])
def test_a_merge_that_fails_takes_all_back_to_the_last_checkpoint(what: str) -> None:
    replicas = averaging(every=1).open()
    replicas.apply(0, "a", 1)
    replicas.apply(1, "b", 1)
    replicas.decide()
    if what == "does not merge":
        decided = merged(replicas, failure="node 1, stage 0: no answer")
    else:
        if what == "leaves before the save":
            merged(replicas)
        replicas.beat(1, instance="new")
        decided = replicas.decide()

    closed = [each.actions for each in decided if isinstance(each, NodeActions) and each.actions]
    assert all(isinstance(actions[-1], Closed | Restore) for actions in closed)
    assert {node.version for node in replicas.nodes.values()} == {0}
    assert {node.life.phase for node in replicas.nodes.values()} <= {"closed", "restoring"}


def test_a_merged_version_that_cannot_be_saved_stays_and_is_saved_again_after_a_while() -> None:
    replicas = averaging(every=1).open()
    replicas.apply(0, "a", 1)
    replicas.apply(1, "b", 1)
    replicas.decide()
    merged(replicas)
    replicas.save(0, 2, failure="disk full")

    replicas.now_s = 1.9
    assert replicas.decide() == []
    replicas.now_s = 2.0
    (again,) = replicas.decide()
    assert isinstance(again, NodeActions)
    assert again.actions == (RequestSave(1, 2, 1),)
    assert {(node.version, node.work.gate.is_paused) for node in replicas.nodes.values()} == {(2, True)}

    replicas.save(0, 2)
    replicas.decide()
    assert {(node.durable_version, node.work.gate.is_paused) for node in replicas.nodes.values()} == {
        (2, False)
    }


def fail_to_merge(replicas: Replicas) -> list[Decision]:
    """Each node learns a batch, and the merge that is due then fails."""
    for number, node in replicas.nodes.items():
        replicas.apply(number, f"{number}-{replicas.now_s}", 1)
        assert node.version == 1
    assert [type(each) for each in replicas.decide()] == [Merge]
    assert isinstance(replicas.decided[-1], Merge)
    return merged(replicas, replicas.decided[-1].name, "node 1, stage 0: no peer")


def test_after_a_merge_that_fails_the_next_one_waits_longer_each_time() -> None:
    replicas = averaging(every=1).open()
    fail_to_merge(replicas)
    for pause_s in (2.0, 4.0):
        replicas.open()
        for number in replicas.nodes:
            replicas.apply(number, f"early {number} {pause_s}", 1)
        replicas.now_s += pause_s - 0.1
        assert replicas.decide() == []
        replicas.now_s += 0.2
        (merge,) = replicas.decide()
        assert isinstance(merge, Merge)
        merged(replicas, merge.name, "node 1, stage 0: no peer")


def test_after_three_merges_in_a_row_that_fail_nodes_train_no_more_and_say_why() -> None:
    replicas = averaging(every=1).open()
    for _ in range(MAX_FAILURES):
        assert not any(node.work.gate.halt_reason for node in replicas.nodes.values())
        decided = fail_to_merge(replicas)
        replicas.now_s += 100.0
        replicas.open()

    reason = "3 merges in a row failed; a merge failed: node 1, stage 0: no peer"
    halted = [each.actions for each in decided if isinstance(each, NodeActions)][2:4]
    assert halted == [(Halted(reason),), (Halted(reason),)]
    assert {node.work.gate.halt_reason for node in replicas.nodes.values()} == {reason}
    assert {node.life.phase for node in replicas.nodes.values()} == {"open"}, "they serve"


def go_back(replicas: Replicas, version: int) -> None:
    """All to that version, for good; it is looked at them in the middle, too."""
    for node in replicas.nodes.values():
        node.roll_back(version)
    assert replicas.decide() == []
    for node in replicas.nodes.values():
        node.rolled_back("")
    replicas.open()


def test_a_rollback_in_the_middle_of_a_merge_ends_it_and_all_come_back_together() -> None:
    replicas = averaging(every=1).open()
    replicas.apply(0, "a", 1)
    replicas.apply(1, "b", 1)
    assert [type(each) for each in replicas.decide()] == [Merge]

    go_back(replicas, 0)

    assert merged(replicas) == [], "whatever is answered later"
    replicas.apply(0, "c", 1)
    replicas.apply(1, "d", 1)
    (merge,) = replicas.decide()
    assert isinstance(merge, Merge)
    assert (merge.name, merge.version) == ("merge-1", 2)


def test_nobody_joins_during_a_rollback() -> None:
    replicas = averaging().open(0)
    replicas.nodes[0].roll_back(0)
    replicas.beat(1)

    assert replicas.decide() == []

    replicas.nodes[0].rolled_back("")
    assert Joins(1) in replicas.decide()


def test_merges_that_failed_before_a_rollback_count_no_more() -> None:
    replicas = averaging(every=1).open()
    for _ in range(MAX_FAILURES):
        fail_to_merge(replicas)
        replicas.now_s += 100.0
        replicas.open()
    assert all(node.work.gate.halt_reason for node in replicas.nodes.values())

    go_back(replicas, 0)
    fail_to_merge(replicas)

    assert not any(node.work.gate.halt_reason for node in replicas.nodes.values())


def test_a_merge_whose_answers_may_be_lost_with_the_connection_is_given_up() -> None:
    replicas = averaging(every=1).open()
    assert replicas.nodes[0].messages_lost() == []
    replicas.apply(0, "a", 1)
    replicas.apply(1, "b", 1)
    replicas.decide()

    (closed,) = replicas.nodes[0].messages_lost()
    replicas.decide()

    assert isinstance(closed, Closed)
    assert {node.version for node in replicas.nodes.values()} == {0}
    assert merged(replicas) == [], "whatever is answered later"


def test_a_merged_version_is_kept_and_published() -> None:
    replicas = averaging(publishing=PublishingRules(serving="pinned", max_kept=2)).open()
    replicas.nodes[1].work.place("a", 0.0)
    replicas.report(1, BatchReady(batch_id="a", squared_norm=1.0))
    replicas.report(
        1, BatchStepped(batch_id="a", version=1, loss=1.0)
    )  # kept, and with the restored one that is all
    replicas.now_s = 2.0
    replicas.decide()
    replicas.now_s = 4.0
    (merge,) = replicas.decide()
    assert isinstance(merge, Merge)
    assert [member.is_kept for member in merge.members] == [True, False]

    published = [each.actions for each in merged(replicas) if isinstance(each, NodeActions)]

    assert published[:2] == [(Publish(1),), ()]


def test_a_guard_evaluates_what_nodes_have_merged_which_is_saved_and_nothing_of_one_node() -> None:
    replicas = averaging(1, every=3, publishing=PublishingRules(serving="published", evaluate_every=2)).open()
    replicas.nodes[0].work.publishing.evaluated(0, Losses(held_out=2.0))
    for number, batch_id in enumerate("abc", start=1):
        assert replicas.apply(0, batch_id, number) == [Applied(batch_id, number, 1.0)]

    merge = replicas.decide()[-1]

    assert isinstance(merge, Merge)
    assert (merge.version, merge.members[0].is_kept) == (3, True)
    actions = [each.actions for each in merged(replicas) if isinstance(each, NodeActions)]
    assert actions == [(Evaluate(3),), (RequestSave(1, 3, 1),)]


def test_nobody_joins_in_the_middle_of_a_merge() -> None:
    replicas = averaging(3, every=1).open(0, 1)
    replicas.apply(0, "a", 1)
    replicas.apply(1, "b", 1)
    replicas.decide()
    replicas.beat(2)
    assert replicas.decide() == []
    merged(replicas)
    replicas.save(0, 2)

    replicas.decide()

    assert replicas.nodes[2].life.phase == "restoring"
    assert replicas.nodes[2].version == 2


def test_no_merge_begins_while_a_node_loads_the_weights_of_the_last_one() -> None:
    replicas = averaging(every=1).open(0)
    replicas.beat(1)
    replicas.decide()
    replicas.apply(0, "a", 1)
    assert replicas.decide() == []
    assert replicas.nodes[0].work.place("b", replicas.now_s) == [], "it learns no more until they are one"

    replicas.restored(1)
    (goes_on,) = replicas.decide()
    replicas.apply(1, "c", 1)

    assert goes_on == NodeActions(0, (Feed("b"), StepsAhead("b", 2)))
    assert (replicas.decide(), replicas.nodes[0].work.gate.is_paused) == ([], True), (
        "batch b has begun, a merge waits for it"
    )


def test_a_node_that_fails_apart_from_a_merge_gives_back_only_its_own() -> None:
    replicas = averaging(every=100).open()
    replicas.apply(0, "a", 1)
    replicas.apply(1, "b", 1)

    assert replicas.beat(1, instance="new") == [Closed("stage 0 was restarted", ())]
    replicas.decide()

    assert replicas.nodes[0].version == 1
    assert (replicas.nodes[1].life.phase, replicas.nodes[1].version) == ("restoring", 0)


def test_an_applied_batch_is_told_of_as_ever() -> None:
    replicas = averaging().open()
    assert replicas.apply(0, "a", 1) == [Applied("a", 1, 1.0)]
