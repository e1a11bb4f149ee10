"""The state of a fine-tuning job: what may happen to it, in which order, and what it wants published."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from services.gateway.jobs.happenings import (
    Cancelled,
    Failed,
    Published,
    RequestAnswered,
    Started,
    Succeeded,
    ToPublish,
    Unknown,
    Validated,
)
from services.gateway.jobs.job import Job, JobError, estimated_finish, job_of, matches
from services.gateway.jobs.transitions import Outcome, after, counted, created, due
from shared.messages.training import (
    BatchApplied,
    BatchDeferred,
    BatchDurable,
    BatchHeldOut,
    BatchPlaced,
    BatchRejected,
)
from tests.unit.gateway.jobs.support import NOW_S, following, new_job, running_job

WINDOW = 3
ERROR = JobError(code="c", message="no")


def published(job: Job, *steps: int) -> Job:
    for step in steps:
        happenings = (ToPublish(step, num_tokens=10 * step), Published(step, sequence=100 + step))
        job = following(job, *happenings)[-1].job
    return job


def applied(job: Job, step: int, version: int, node: int = 0) -> BatchApplied:
    return BatchApplied(batch_id=job.batch_id(step), node=node, version=version, loss=1 / step, num_tokens=1)


def durable(job: Job, *steps: int, version: int = 1) -> BatchDurable:
    ids = tuple(job.batch_id(step) for step in steps)
    return BatchDurable(batch_ids=ids, node=0, version=version, checkpoint="/c")


def test_a_job_is_validated_queued_and_started() -> None:
    outcomes = following(new_job(), Validated(5), Started())
    assert [outcome.job.status for outcome in outcomes] == ["queued", "running"]
    job = outcomes[-1].job
    assert (job.steps_per_epoch, job.total_steps, job.started_at) == (3, 6, NOW_S)
    assert all(len(outcome.notes) == 1 for outcome in outcomes)


def test_batches_are_named_by_job_epoch_and_place() -> None:
    job = running_job()
    assert [job.batch_id(step) for step in (1, 3, 4)] == [
        "ftjob-0a-e1-b00001",
        "ftjob-0a-e1-b00003",
        "ftjob-0a-e2-b00001",
    ]
    assert job_of("ftjob-0a-e2-b00001") == "ftjob-0a"
    assert [job_of(other) for other in ("seq-3", "ftjob-0a", "x-ftjob-0a-e1-b00001", "")] == [None] * 4


@pytest.mark.parametrize("status", ["validating_files", "queued", "succeeded", "failed", "cancelled"])
def test_only_a_running_job_publishes(status: Any) -> None:
    assert due(running_job().model_copy(update={"status": status}), WINDOW) is None


def test_no_more_is_published_than_the_window_holds() -> None:
    job = running_job()
    for step in (1, 2, 3):
        assert due(job, WINDOW) == step
        job = published(job, step)
    assert due(job, WINDOW) is None
    job = after(job, applied(job, 1, version=7), NOW_S).job
    assert due(job, WINDOW) == 4


def test_a_step_that_was_not_stored_is_published_before_any_other() -> None:
    job = after(published(running_job(), 1), ToPublish(2, 10), NOW_S).job
    assert due(job, WINDOW) == 2
    assert (job.lag, len(job.unapplied)) == (1, 2)
    assert due(after(job, Published(2, 102), NOW_S).job, WINDOW) == 3


def test_after_the_last_step_nothing_is_due() -> None:
    job = published(running_job(), 1, 2, 3, 4, 5, 6)
    assert due(job, 100) is None


def test_what_was_told_of_a_step_before_it_is_known_to_be_stored_counts() -> None:
    job = after(running_job(), ToPublish(1, 10), NOW_S).job
    early = following(job, applied(job, 1, version=1), durable(job, 1), Published(1, 101))
    assert [outcome.job.open.get(1) is None for outcome in early] == [False, True, True]
    assert early[-1].job.durable_tokens == 10


def test_an_applied_step_is_noted_once_and_counted_by_its_tokens() -> None:
    job = published(running_job(), 1, 2)
    first, again = following(job, applied(job, 2, version=9), applied(job, 2, version=9))
    (note,) = first.notes
    assert note.metrics == {"step": 2, "train_loss": 0.5, "total_steps": 6}
    assert (first.job.trained_tokens, first.job.lag, first.job.num_applied) == (20, 1, 1)
    assert again == Outcome(first.job)


def test_a_step_that_its_node_lost_is_open_again_until_it_is_applied_anew() -> None:
    job = published(running_job(), 1)
    steps = following(
        job,
        applied(job, 1, version=9),
        BatchPlaced(batch_id=job.batch_id(1), node=2),
        applied(job, 1, 4, node=2),
    )
    assert [outcome.job.trained_tokens for outcome in steps] == [10, 0, 10]
    assert [outcome.job.lag for outcome in steps] == [0, 1, 0]
    assert [outcome.job.nodes for outcome in steps] == [set(), {2}, set()]
    assert (steps[-1].job.first_version, steps[-1].job.last_version) == (4, 9)


def test_a_job_awaits_its_verdict_only_when_every_step_is_durable() -> None:
    job = published(running_job(num_examples=2, n_epochs=2), 1, 2)
    job = following(job, applied(job, 1, 1), applied(job, 2, 2))[-1].job
    first, last = following(job, durable(job, 1), durable(job, 2, version=2))
    assert [outcome.job.awaits_verdict for outcome in (first, last)] == [False, True]
    assert [outcome.saved[0].step_number for outcome in (first, last)] == [1, 2]
    assert [outcome.saved[0].version for outcome in (first, last)] == [1, 2]
    assert last.job.durable_versions == {0: 2}
    ended = after(last.job, Succeeded(), NOW_S).job
    assert (ended.status, ended.finished_at, ended.trained_tokens) == ("succeeded", NOW_S, 30)


def test_a_job_with_steps_to_publish_awaits_no_verdict() -> None:
    job = published(running_job(), 1)
    assert not after(job, durable(job, 1), NOW_S).job.awaits_verdict


def test_a_checkpoint_of_other_batches_is_none_of_the_job() -> None:
    job = published(running_job(), 1)
    others = BatchDurable(batch_ids=("b-1", "ftjob-0b-e1-b00001"), node=0, version=1, checkpoint="/c")
    assert after(job, others, NOW_S) == Outcome(job)


def test_deferrals_of_its_own_batches_are_preemptions() -> None:
    job = published(running_job(), 1)
    own, other = (BatchDeferred(batch_id=batch_id) for batch_id in (job.batch_id(1), "b-1"))
    assert following(job, own, own, other)[-1].job.preemptions == 2


def test_a_rejected_step_fails_the_job_with_its_reason() -> None:
    job = published(running_job(), 1, 2)
    rejected = BatchRejected(batch_id=job.batch_id(2), reason="NaN")
    failed, again = following(job, rejected, rejected)
    assert (failed.job.status, failed.job.error.message) == ("failed", "Step 2 was rejected: NaN")
    assert again.notes == ()
    assert list(failed.job.open) == [1]


def test_a_step_whose_examples_are_all_held_out_is_done_without_weights() -> None:
    job = published(running_job(num_examples=2, n_epochs=2), 1, 2)
    first, again, last = following(
        job, *[BatchHeldOut(batch_id=job.batch_id(1))] * 2, BatchHeldOut(batch_id=job.batch_id(2))
    )
    assert [note.message for note in first.notes] == [
        "Step 1/2: all of its examples are held out (LEMIX_HOLD_OUT_SHARE)"
    ]
    assert again == Outcome(first.job)
    assert first.job.status == "running"
    assert (last.job.status, last.job.error.code) == ("failed", "all_held_out")
    assert [note.level for note in last.notes] == ["info", "error"]


def test_a_job_that_has_trained_something_awaits_its_verdict_though_the_rest_is_held_out() -> None:
    job = published(running_job(num_examples=2, n_epochs=2), 1, 2)
    last = following(job, durable(job, 1), BatchHeldOut(batch_id=job.batch_id(2)))[-1].job
    assert last.awaits_verdict


def test_a_rollback_to_a_lower_version_that_has_the_steps_lowers_the_one_that_must_serve() -> None:
    job = published(running_job(num_examples=2, n_epochs=2), 1, 2)
    last = following(job, durable(job, 1, 2, version=9))[-1].job
    for told, version, expected in ((1, 5, 9), (2, 7, 7), (2, 12, 7)):
        last = after(last, durable(job, told, version=version), NOW_S).job
        assert last.durable_versions == {0: expected}


def test_a_durable_step_that_a_rollback_took_out_fails_the_job() -> None:
    job = published(running_job(), 1, 2)
    gone = BatchRejected(batch_id=job.batch_id(1), reason="a rollback")
    last = following(job, durable(job, 1), gone, durable(job, 2))[-1].job
    assert (last.status, last.error.code) == ("failed", "step_discarded")
    assert last.error.message == "Step 1, which was durable, is in the weights no longer: a rollback"


def test_a_job_that_has_ended_stays_as_it_is_when_its_steps_are_taken_out() -> None:
    job = published(running_job(num_examples=2, n_epochs=1), 1)
    job = following(job, applied(job, 1, 1), durable(job, 1), Succeeded())[-1].job
    gone = BatchRejected(batch_id=job.batch_id(1), reason="a rollback")
    assert job.status == "succeeded"
    assert after(job, gone, NOW_S) == Outcome(job)


def test_the_newest_durable_step_of_each_node_is_remembered() -> None:
    job = published(running_job(), 1, 2, 3)
    elsewhere = structs.replace(durable(job, 3), node=1)
    assert following(job, durable(job, 2), durable(job, 1), elsewhere)[-1].job.newest_durable == {0: 2, 1: 3}


def test_what_the_trainer_has_passed_by_is_published_again_and_what_is_to_come_is_not() -> None:
    job = published(running_job(), 1, 2)
    unknown = [Unknown(job.batch_id(step), read_up_to=101) for step in (1, 2)]
    job = following(job, *unknown)[-1].job
    assert (job.open[1].sequence, job.open[2].sequence) == (0, 102)
    assert due(job, WINDOW) == 1


def test_a_job_that_has_ended_lets_go_of_what_the_trainer_does_not_know() -> None:
    job = published(running_job(), 1)
    assert following(job, Cancelled(), Unknown(job.batch_id(1), 101))[-1].job.lag == 0


@pytest.mark.parametrize("end", [Cancelled(), Failed(ERROR)])
@pytest.mark.parametrize("begin", [0, 1, 2])
def test_an_end_is_an_end(end: Any, begin: int) -> None:
    job = following(new_job(), *[Validated(5), Started()][:begin], end)[-1].job
    for happening in (Validated(9), Started(), Cancelled(), Failed(ERROR)):
        assert after(job, happening, NOW_S + 5) == Outcome(job)


def test_what_was_published_before_the_end_is_still_counted() -> None:
    job = following(published(running_job(), 1), Cancelled())[-1].job
    last = following(job, applied(job, 1, version=3), durable(job, 1))[-1].job
    assert (last.status, last.trained_tokens, last.last_version, last.lag) == ("cancelled", 10, 3, 0)


def test_requests_are_counted() -> None:
    job = following(running_job(), RequestAnswered(True), RequestAnswered(False))[-1].job
    assert (job.requests, job.late_requests) == (2, 1)


def test_the_finish_is_foretold_from_the_pace_so_far() -> None:
    job = published(running_job(), 1, 2, 3)
    assert estimated_finish(job, NOW_S + 20) is None
    job = following(job, applied(job, 1, 1), applied(job, 2, 2))[-1].job
    assert estimated_finish(job, NOW_S + 20) == NOW_S + 20 + 40
    assert estimated_finish(after(job, Cancelled(), NOW_S).job, NOW_S + 20) is None


def test_metadata_is_matched() -> None:
    plain, marked = new_job(), new_job(metadata={"a": "1", "b": "2"})
    assert [matches(job, {"a": "1"}) for job in (plain, marked)] == [False, True]
    assert not matches(marked, {"a": "2"})
    assert [matches(job, None) for job in (plain, marked)] == [True, False]
    assert matches(plain, {}) and matches(marked, {})


def test_events_and_checkpoints_are_counted() -> None:
    job = counted(created(new_job()))
    assert job.num_events == 2
    job = published(running_job(), 1)
    assert counted(after(job, durable(job, 1), NOW_S)).num_checkpoints == 1


STEPS = st.integers(1, 7)


@st.composite
def happenings(draw: st.DrawFn) -> Any:
    """Anything, sensible or not, about steps of a job of six."""
    step, job = draw(STEPS), running_job()
    batch_id = job.batch_id(step)
    version = draw(st.integers(1, 9))
    return draw(
        st.sampled_from(
            (
                Validated(5),
                Started(),
                Published(step, 100 + step),
                Unknown(batch_id, draw(st.integers(99, 108))),
                BatchPlaced(batch_id=batch_id, node=0),
                BatchDeferred(batch_id=batch_id),
                applied(job, step, version),
                durable(job, step, draw(STEPS), version=version),
                RequestAnswered(True),
            )
        )
    )


@given(st.lists(st.one_of(happenings(), st.just("publish")), max_size=60), st.integers(1, 4))
def test_whatever_happens_a_job_keeps_its_count(events: list[Any], window: int) -> None:
    job = running_job()
    ever_durable: set[int] = set()
    for event in events:
        if event == "publish":
            step = due(job, window)
            if step is None:
                continue
            assert step not in ever_durable, "what is durable is never published again"
            event = ToPublish(step, num_tokens=1)
        before = job
        job = after(job, event, NOW_S).job
        if isinstance(event, BatchDurable):
            ever_durable |= before.open.keys() - job.open.keys()
        done = set(range(1, job.next_step)) - job.open.keys()
        assert done == ever_durable
        assert job.durable_tokens == len(ever_durable)
        if isinstance(event, ToPublish):
            assert len(job.unapplied) <= max(window, len(before.unapplied))
        assert job.awaits_verdict == (ever_durable == set(range(1, 7)))


@given(st.data())
def test_a_job_whose_batches_come_through_is_durable_whatever_is_lost_on_the_way(data: st.DataObject) -> None:
    """The trainer applies what it gets and saves at times; a message arrives or is lost; asking heals."""
    job, in_weights, saved = running_job(), [], set()
    for _ in range(200):
        if (step := due(job, WINDOW)) is not None:
            job = published(job, step)
            in_weights += [step] if step not in in_weights else []
        if data.draw(st.booleans()):
            saved |= set(in_weights)
        arrives = data.draw(st.booleans())
        for step in list(job.open) if arrives else []:
            event = durable(job, step) if step in saved else applied(job, step, in_weights.index(step) + 1)
            job = after(job, event, NOW_S).job
        if job.awaits_verdict:
            break
    else:
        saved |= set(in_weights)
    if not job.awaits_verdict:  # chance has lost too much: the next answer of the trainer ends it
        while (step := due(job, WINDOW)) is not None or job.open:
            job = published(job, step) if step is not None else after(job, durable(job, *job.open), NOW_S).job
    assert job.awaits_verdict
    assert job.durable_tokens == sum(10 * step for step in range(1, 7))
