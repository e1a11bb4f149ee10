"""Steps that nodes make together, event by event."""

import itertools
from collections.abc import Sequence
from math import nan
from typing import Any

import pytest

from services.trainer.nodes.decisions import (
    Action,
    Applied,
    RequestSave,
    Skipped,
    Step,
)
from services.trainer.publication.losses import Losses
from services.trainer.publication.publishing import Publish, PublishingRules
from services.trainer.sharing.allreduce import Reductions
from services.trainer.sharing.decisions import Decision, Joins, Member, NodeActions, Reduce, Shared
from shared.messages.training import BatchReady, BatchStepped
from tests.unit.trainer.sharing.test_average import Replicas, go_back


def reducing(num_nodes: int = 2, *, save_every: int = 100, **rules: Any) -> Replicas:
    names = (f"round-{number}" for number in itertools.count())
    decides = Reductions(save_every=save_every, idle_s=2.0, new_name=lambda: next(names))
    return Replicas(num_nodes, decides, shares_steps=True, **rules)


def actions_in(decisions: Sequence[Decision]) -> list[Action]:
    return [action for each in decisions if isinstance(each, NodeActions) for action in each.actions]


def step(replicas: Replicas, version: int, **batches: str) -> list[Action]:
    """All have the averaged gradients and then step; `node_0="a"`: what each steps on."""
    by_node = {int(node.removeprefix("node_")): batch_id for node, batch_id in batches.items()}
    for node, batch_id in by_node.items():
        replicas.report(node, BatchReady(batch_id=batch_id, squared_norm=1.0))
    rate_of = tuple(batch_id for batch_id in by_node.values() if not batch_id.startswith("round"))
    assert actions_in(replicas.decide()) == [
        Step(batch_id, version, rate_of=rate_of) for batch_id in by_node.values()
    ]
    applied: list[Action] = []
    for node, batch_id in by_node.items():
        applied += replicas.report(node, BatchStepped(batch_id=batch_id, version=version, loss=1.0))
    assert replicas.decide()[0] == Shared(tuple(by_node))
    return applied


def test_all_nodes_step_on_the_mean_of_their_gradients() -> None:
    replicas = reducing().open()
    assert replicas.learn(0, "a")[1:] == [], "no node steps by itself"
    replicas.learn(1, "b")

    assert replicas.decide() == [Reduce("round-0", (Member(0, 1, 1, 0.5, "a"), Member(1, 2, 1, 0.5, "b")))]
    assert step(replicas, 2, node_0="a", node_1="b") == [Applied("a", 2, 1.0), Applied("b", 2, 1.0)]
    assert {node.version for node in replicas.nodes.values()} == {2}


def test_all_nodes_scale_the_mean_alike_whatever_norm_each_has_found() -> None:
    replicas = reducing(max_gradient_norm=1.0).open()
    replicas.learn(0, "a")
    replicas.learn(1, "b")
    replicas.decide()
    replicas.report(0, BatchReady(batch_id="a", squared_norm=4.0))
    replicas.report(1, BatchReady(batch_id="b", squared_norm=4.000001))

    assert actions_in(replicas.decide()) == [
        Step(batch_id, 2, gradient_scale=0.5, rate_of=("a", "b")) for batch_id in "ab"
    ]


def test_a_node_without_a_batch_steps_with_the_others() -> None:
    replicas = reducing().open()
    replicas.learn(1, "b")

    assert replicas.decide() == [Reduce("round-0", (Member(0, 1, 1, 0.0, ""), Member(1, 2, 1, 1.0, "b")))]
    assert step(replicas, 1, node_0="round-0", node_1="b") == [Applied("b", 1, 1.0)]
    assert {node.version for node in replicas.nodes.values()} == {1}


def test_every_node_publishes_the_common_version_also_one_without_a_batch() -> None:
    replicas = reducing(publishing=PublishingRules(serving="pinned")).open()
    replicas.learn(1, "b")
    replicas.decide()
    by_node = {0: "round-0", 1: "b"}
    for node, batch_id in by_node.items():
        replicas.report(node, BatchReady(batch_id=batch_id, squared_norm=1.0))
    replicas.decide()
    for node, batch_id in by_node.items():
        assert Publish(1) in replicas.report(node, BatchStepped(batch_id=batch_id, version=1, loss=1.0))


def test_a_batch_on_its_way_is_waited_for() -> None:
    replicas = reducing().open()
    replicas.nodes[1].work.place("b", 0.0)
    replicas.learn(0, "a")

    assert replicas.decide() == []


def test_gradients_that_are_not_finite_spoil_no_others() -> None:
    replicas = reducing().open()
    replicas.learn(0, "a", nan)
    replicas.learn(1, "b")

    first, *rest = replicas.decide()

    assert actions_in([first]) == [Step("a", 0, is_skipped=True)]
    assert rest == []
    assert replicas.report(0, BatchStepped(batch_id="a", version=0, loss=1.0)) == [Skipped("a", 1.0)]
    assert replicas.decide() == [Reduce("round-0", (Member(0, 1, 1, 0.0, ""), Member(1, 2, 1, 1.0, "b")))]


def test_one_node_saves_for_all() -> None:
    replicas = reducing(save_every=2).open()
    replicas.learn(0, "a")
    replicas.learn(1, "b")
    replicas.decide()
    step(replicas, 2, node_0="a", node_1="b")
    assert RequestSave(1, 2, 1) in actions_in(replicas.decided)
    replicas.save(0, 2)
    replicas.decide()

    assert {node.durable_version for node in replicas.nodes.values()} == {2}


def guarded(*, save_every: int, num_nodes: int = 2) -> Replicas:
    """Versions are due for evaluation every second step; the first one served has been evaluated. Two nodes
    are there.
    """
    guard = PublishingRules(serving="published", evaluate_every=2, max_kept=3)
    replicas = reducing(num_nodes, save_every=save_every, publishing=guard).open(0, 1)
    for number in (0, 1):
        replicas.nodes[number].work.publishing.evaluated(0, Losses(held_out=2.0))
    return replicas


def guarded_step(replicas: Replicas, version: int) -> list[Action]:
    """All step on one batch; what is decided on the way."""
    batch_id = f"b{version}"
    replicas.learn(1, batch_id)
    replicas.decide()
    for node, name in enumerate((f"round-{version - 1}", batch_id)):
        replicas.report(node, BatchReady(batch_id=name, squared_norm=1.0))
    ordered = actions_in(replicas.decide())
    for node, action in enumerate(ordered):
        assert isinstance(action, Step)
        replicas.report(node, BatchStepped(batch_id=action.batch_id, version=version, loss=1.0))
    return ordered + actions_in(replicas.decide())


def is_kept(actions: list[Action]) -> list[bool]:
    return [action.is_kept for action in actions if isinstance(action, Step)]


def test_what_a_guard_evaluates_is_saved() -> None:
    replicas = guarded(save_every=100)
    assert is_kept(guarded_step(replicas, 1)) == [False, False]

    second = guarded_step(replicas, 2)

    assert is_kept(second) == [True, True]
    assert second[-1] == RequestSave(1, 2, 1)


def test_what_a_guard_evaluates_is_saved_before_the_others_step_on_while_one_waits_to_join() -> None:
    replicas = guarded(save_every=100, num_nodes=3)
    guarded_step(replicas, 1)
    replicas.learn(1, "b2")
    replicas.nodes[1].work.place("c", 0.0)  # begins when version 2 is there
    replicas.decide()
    for node, name in enumerate(("round-1", "b2")):
        replicas.report(node, BatchReady(batch_id=name, squared_norm=1.0))
    assert is_kept(actions_in(replicas.decide())) == [True, True]
    replicas.beat(2)
    for node, name in enumerate(("round-1", "b2")):
        replicas.report(node, BatchStepped(batch_id=name, version=2, loss=1.0))

    assert RequestSave(1, 2, 1) in actions_in(replicas.decide())


def test_a_guard_waits_for_a_save_that_is_under_way() -> None:
    replicas = guarded(save_every=1)
    assert guarded_step(replicas, 1)[-1] == RequestSave(1, 1, 1)
    replicas.nodes[0].work.save_answered(1, {}, 0.0)
    assert is_kept(guarded_step(replicas, 2)) == [False, False]
    for version in (1, 2):
        replicas.save(0, version)
        replicas.decide()

    assert is_kept(guarded_step(replicas, 3)) == [True, True]


@pytest.mark.parametrize("joins", [False, True])
def test_a_save_that_fails_is_asked_for_again_only_after_a_while(joins: bool) -> None:
    replicas = reducing(save_every=2).open(0)
    replicas.learn(0, "a")
    replicas.decide()
    step(replicas, 1, node_0="a")
    replicas.learn(0, "b")
    replicas.decide()
    step(replicas, 2, node_0="b")
    replicas.save(0, 2, failure="disk full")
    if joins:
        replicas.beat(1)

    replicas.now_s = 1.9
    assert replicas.decide() == []
    replicas.now_s = 2.0
    assert actions_in(replicas.decide()) == [RequestSave(1, 2, 1)]


def test_who_joins_gets_what_the_others_hold_and_they_wait() -> None:
    replicas = reducing().open(0)
    replicas.learn(0, "a")
    replicas.decide()
    step(replicas, 1, node_0="a")
    replicas.beat(1)
    assert actions_in(replicas.decide()) == [RequestSave(1, 1, 1)]
    replicas.save(0, 1)
    decided = replicas.decide()
    assert decided[0] == Joins(1)
    assert (replicas.nodes[1].life.phase, replicas.nodes[1].version) == ("restoring", 1)
    assert replicas.nodes[0].work.gate.is_paused

    replicas.restored(1)
    replicas.decide()

    assert not replicas.nodes[0].work.gate.is_paused


def test_who_leaves_in_the_middle_takes_all_back() -> None:
    replicas = reducing().open()
    replicas.learn(0, "a")
    replicas.learn(1, "b")
    replicas.decide()
    replicas.beat(1, instance="new")
    replicas.decide()

    assert {node.life.phase for node in replicas.nodes.values()} <= {"closed", "restoring"}


def test_who_is_restored_first_waits_with_its_step_for_the_others() -> None:
    replicas = reducing().open()
    replicas.learn(0, "a")
    replicas.learn(1, "b")
    replicas.decide()
    replicas.beat(1, instance="new")
    replicas.decide()
    replicas.beat(0)
    replicas.decide()
    assert {node.life.phase for node in replicas.nodes.values()} == {"restoring"}
    for number, batch_id in enumerate("ab"):
        replicas.nodes[number].work.place(batch_id, 0.0)

    replicas.restored(1)
    replicas.report(1, BatchReady(batch_id="b", squared_norm=1.0))
    assert replicas.decide() == [], "the other will hold the weights from before this step"
    replicas.restored(0)
    replicas.report(0, BatchReady(batch_id="a", squared_norm=1.0))

    (reduce,) = (each for each in replicas.decide() if isinstance(each, Reduce))
    assert [member.batch_id for member in reduce.members] == ["a", "b"]


def test_a_rollback_in_the_middle_of_a_step_ends_it() -> None:
    replicas = reducing().open()
    replicas.learn(0, "a")
    replicas.learn(1, "b")
    replicas.decide()

    go_back(replicas, 0)

    replicas.learn(1, "c")
    (reduce,) = replicas.decide()
    assert isinstance(reduce, Reduce)
    assert [member.batch_id for member in reduce.members] == ["", "c"]
