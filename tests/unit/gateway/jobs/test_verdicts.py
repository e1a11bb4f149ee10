"""A job ends by what a guard makes of the versions that hold its steps."""

from math import nan
from typing import Any

import pytest

from services.gateway.jobs.job import Job, SavedSteps, Step, VersionVerdict
from services.gateway.jobs.objects import checkpoint, judged
from services.gateway.jobs.transitions import Outcome
from services.gateway.jobs.verdicts import after_verdicts
from shared.messages.weights import JudgedVersion, NodeWeights, WeightsStatus
from tests.support.fake_trainer import node_weights
from tests.unit.gateway.jobs.support import NOW_S, running_job

BAD = "held-out loss 9.0000 is above 1.0000"


def verdict_on(
    version: int, *, withheld: str = "", at_s: float = NOW_S + 1, **losses: float
) -> JudgedVersion:
    return JudgedVersion(version=version, judged_wall_s=at_s, why_withheld=withheld, **losses)


def durable_job(**versions: int) -> Job:
    """All six steps are durable: on nodes `n0` and `n1`, by those versions."""
    by_node = {int(name.removeprefix("n")): version for name, version in versions.items()}
    changes = {"next_step": 7, "durable_versions": by_node, "first_version": 5, "last_version": 10}
    return running_job().model_copy(update=changes)


def told(*nodes: NodeWeights, shares_weights: bool = False) -> WeightsStatus:
    return WeightsStatus(nodes=nodes, shares_weights=shares_weights)


def served(node: int, version: int) -> NodeWeights:
    return node_weights(node, published=version, newest_judged=version)


def withheld(node: int, version: int) -> NodeWeights:
    judged = (verdict_on(version, withheld=BAD),)
    return node_weights(node, published=4, newest_judged=version, judged=judged)


WAITING = node_weights(0, published=4, newest_judged=4)
RESTORING = node_weights(0, published=None, newest_judged=10)
PLAIN = node_weights(0, published=None, is_guarded=False)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (told(PLAIN), "succeeded"),
        (told(served(0, 10)), "succeeded"),
        (told(served(0, 12)), "succeeded"),
        (told(withheld(0, 10)), "failed"),
        (told(withheld(0, 12)), "failed"),
        (told(served(0, 9)), "running"),
        (told(withheld(0, 9)), "running"),
        (told(WAITING), "running"),
        (told(RESTORING), "running"),
        (told(), "running"),
        (told(served(1, 10)), "running"),
        (told(RESTORING, served(1, 10), shares_weights=True), "succeeded"),
        (told(RESTORING, withheld(1, 10), shares_weights=True), "failed"),
        (told(shares_weights=True), "running"),
    ],
)
def test_a_durable_job_ends_when_a_version_with_all_of_it_is_judged(
    status: WeightsStatus, expected: str
) -> None:
    assert after_verdicts(durable_job(n0=10), status, NOW_S).job.status == expected


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ((served(0, 10), served(1, 7)), "succeeded"),
        ((served(0, 10), served(1, 6)), "running"),
        ((served(0, 10), withheld(1, 7)), "failed"),
        ((served(0, 10),), "running"),
    ],
)
def test_where_nodes_train_apart_each_one_that_learnt_must_serve_it(nodes: Any, expected: str) -> None:
    assert after_verdicts(durable_job(n0=10, n1=7), told(*nodes), NOW_S).job.status == expected


def test_a_job_that_is_withheld_says_which_version_why_and_what_to_do() -> None:
    outcome = after_verdicts(durable_job(n0=10), told(withheld(0, 10)), NOW_S)
    error = outcome.job.error
    assert error is not None and error.code == "withheld_by_guard"
    assert error.message.startswith(
        f"Version 10, which holds what the job taught, is not served: {BAD}. Requests get version 4. "
    )
    assert "docs/versions.md" in error.message
    assert [(note.level, note.message.partition(":")[0]) for note in outcome.notes] == [
        ("warn", "Version 10 is withheld"),
        ("error", "Version 10, which holds what the job taught, is not served"),
    ]


def test_a_job_with_steps_to_come_notes_verdicts_and_goes_on() -> None:
    changes = {"first_version": 5, "next_step": 3, "durable_versions": {0: 5}}
    job = running_job().model_copy(update=changes)
    losses = {"training_loss": 2.0, "held_out_loss": 1.5, "samples_loss": nan}
    status = told(node_weights(0, judged=(verdict_on(4), verdict_on(6, **losses))))
    outcome = after_verdicts(job, status, NOW_S)
    (note,) = outcome.notes
    assert note.message == "Version 6 is served"
    assert note.metrics == {"weights_version": 6, "train_loss": 2.0, "full_valid_loss": 1.5}
    assert outcome.job.status == "running"
    assert after_verdicts(outcome.job, status, NOW_S) == Outcome(outcome.job)


def test_where_nodes_train_apart_verdicts_on_others_are_none_of_the_job() -> None:
    applied = Step(num_tokens=1, sequence=6, node=2, applied_version=8)
    placed = Step(num_tokens=1, sequence=7, node=3)
    job = durable_job(n0=10).model_copy(update={"open": {5: applied, 6: placed}})
    nodes = [node_weights(node, judged=(verdict_on(10),)) for node in range(4)]
    assert [each.node for each in after_verdicts(job, told(*nodes), NOW_S).verdicts] == [0, 2]
    (one,) = after_verdicts(job, told(nodes[1], shares_weights=True), NOW_S).verdicts
    assert one.node is None


def test_verdicts_from_before_the_job_and_after_its_end_are_none_of_it() -> None:
    job = durable_job(n0=10)
    early = told(node_weights(0, published=4, judged=(verdict_on(8, at_s=NOW_S - 1),)))
    assert after_verdicts(job, early, NOW_S).notes == ()
    ended = job.model_copy(update={"status": "cancelled"})
    assert after_verdicts(ended, told(withheld(0, 10)), NOW_S) == Outcome(ended)


def test_a_verdict_on_nodes_that_are_one_model_is_noted_once() -> None:
    outcome = after_verdicts(
        durable_job(n0=10), told(withheld(0, 10), withheld(1, 10), shares_weights=True), NOW_S
    )
    (verdict,) = outcome.verdicts
    assert (verdict.node, verdict.version, verdict.why_withheld) == (None, 10, BAD)


@pytest.mark.parametrize(
    ("node", "version", "why"), [(0, 10, "no"), (None, 10, "no"), (1, 10, None), (0, 9, None)]
)
def test_a_checkpoint_shows_the_losses_of_its_own_version(
    node: int | None, version: int, why: str | None
) -> None:
    verdict = VersionVerdict(
        node=node, version=version, train_loss=9.0, held_out_loss=1.5, samples_loss=0.5, why_withheld="no"
    )
    saved = SavedSteps(step_number=6, node=0, version=10, train_loss=2.0)
    shown = judged(checkpoint(durable_job(n0=10), 0, saved, NOW_S), [verdict])
    assert shown.lemix is not None and shown.lemix.why_withheld == why
    losses = {"full_valid_loss": 1.5, "samples_loss": 0.5} if why else {}
    assert shown.metrics == {"step": 6, "train_loss": 2.0, **losses}
