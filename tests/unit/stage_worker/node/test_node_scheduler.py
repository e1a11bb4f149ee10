"""The node scheduler: traces drawn by hand, and any interleaving of submit, cancel and finish."""

from typing import Any, NamedTuple

import pytest

from services.stage_worker.node.node_scheduler import NodeScheduler
from shared.errors import RefusedError
from shared.messages.inference import Iteration, IterationDone, Pace, SampledToken
from tests.unit.stage_worker.support import task

BLOCK_SIZE = 4


def new_scheduler(
    *, num_in_flight: int = 2, token_budget: int = 8, num_blocks: int = 8, num_rows_ahead: int = 0
) -> NodeScheduler:
    return NodeScheduler(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_in_flight=num_in_flight,
        token_budget=token_budget,
        max_deferrable_tokens=10,
        max_waiting=64,
        vocab_size=128,
        num_rows_ahead=num_rows_ahead,
    )


def submit(
    scheduler: NodeScheduler,
    *task_ids: str,
    prompt_length: int = 3,
    max_tokens: int = 4,
    now_s: float = 0,
    **fields: Any,
) -> None:
    """Requests that begin with tokens of their own, unless `first` is given."""
    for task_id in task_ids:
        fields = {"first": scheduler._next_sequence, **fields}
        one = task(task_id, prompt_length=prompt_length, max_tokens=max_tokens, **fields)
        scheduler.submit(one, deadline_s=now_s + one.timeout_s, traceparent="")


class Started(NamedTuple):
    """An iteration with the tasks of its sequences."""

    iteration: Iteration
    tokens: tuple[int, ...]
    task_ids: tuple[str, ...]


def start(scheduler: NodeScheduler) -> Started:
    first = scheduler.next_iteration()
    assert first is not None
    names = {each.number: task_id for task_id, each in scheduler._here.items()}
    task_ids = tuple(names[number] for number in first.iteration.sequences)
    return Started(first.iteration, first.tokens, task_ids)


def rows(started: Started) -> list[tuple[str, int]]:
    return list(zip(started.task_ids, started.iteration.counts, strict=True))


def done(started: Started, *, token: int | None = 50, finished: tuple[str, ...] = ()) -> IterationDone:
    """All sequences of the iteration that produce get `token`."""
    iteration = started.iteration
    columns = zip(iteration.sequences, started.task_ids, iteration.produces, strict=True)
    tokens = tuple(
        SampledToken(sequence=number, token=token, finished=task_id in finished)
        for number, task_id, produces in columns
        if produces
    )
    return IterationDone(iteration=iteration.number, tokens=tokens)


def test_two_iterations_of_disjoint_sequences_are_in_flight_at_once() -> None:
    scheduler = new_scheduler(token_budget=6)
    submit(scheduler, "a", "b", "c", "d")
    first, second = start(scheduler), start(scheduler)
    assert rows(first) == [("a", 3), ("b", 3)]
    assert rows(second) == [("c", 3), ("d", 3)]
    assert scheduler.next_iteration() is None
    scheduler.finish_iteration(done(first))
    third = start(scheduler)
    assert rows(third) == [("a", 1), ("b", 1)]
    assert third.tokens == (50, 50)
    assert scheduler.next_iteration() is None


def test_training_gives_way_to_an_iteration_as_its_most_pressing_sequence_says() -> None:
    scheduler = new_scheduler()
    submit(scheduler, "usual")
    submit(scheduler, "pressing", pace=Pace(training_turn=0.5))
    assert start(scheduler).iteration.training_turn == 0.5


def test_a_decode_waits_for_its_token() -> None:
    scheduler = new_scheduler()
    submit(scheduler, "a")
    first = start(scheduler)
    assert scheduler.next_iteration() is None
    scheduler.finish_iteration(done(first, token=7))
    assert start(scheduler).tokens == (7,)


def test_pieces_of_one_prompt_follow_each_other_in_flight() -> None:
    scheduler = new_scheduler(token_budget=4)
    submit(scheduler, "a", prompt_length=8)
    first, second = start(scheduler), start(scheduler)
    assert (first.tokens, second.tokens) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert (first.iteration.produces, second.iteration.produces) == ((False,), (True,))
    scheduler.finish_iteration(done(first))
    assert scheduler.next_iteration() is None
    scheduler.finish_iteration(done(second, token=9))
    assert start(scheduler).tokens == (9,)


def test_a_finished_sequence_gives_its_blocks_back() -> None:
    scheduler = new_scheduler()
    submit(scheduler, "a", "b")
    first = start(scheduler)
    (completed,) = scheduler.finish_iteration(done(first, finished=("a",)))
    assert completed.task_id == "a"
    assert (scheduler.num_running, scheduler.blocks.num_free) == (1, 7)


def test_a_sequence_without_a_token_is_complete() -> None:
    scheduler = new_scheduler()
    submit(scheduler, "a", max_tokens=0)
    first = start(scheduler)
    (completed,) = scheduler.finish_iteration(done(first, token=None, finished=("a",)))
    assert completed.task_id == "a"
    assert scheduler.blocks.num_free == 8


def test_a_token_that_cannot_be_drawn_yet_is_asked_for_again_with_the_same_row() -> None:
    scheduler = new_scheduler()
    submit(scheduler, "a", prompt_length=3)
    first = start(scheduler)
    assert scheduler.finish_iteration(done(first, token=None)) == []
    again = start(scheduler)
    assert (again.tokens, again.iteration.starts, again.iteration.produces) == ((2,), (2,), (True,))
    assert (again.iteration.begins, again.iteration.new_blocks) == ((), ())
    scheduler.finish_iteration(done(again, token=7))
    assert start(scheduler).tokens == (7,)


def test_stages_are_told_once_of_sequences_that_are_over() -> None:
    scheduler = new_scheduler(token_budget=4)
    submit(scheduler, "a", "b", "c", "d", prompt_length=4)
    first = start(scheduler)
    assert [each.task_id for each in first.iteration.begins] == ["a"]
    scheduler.remove("a")
    scheduler.remove("c")
    second = start(scheduler)
    assert (first.iteration.left, second.iteration.left) == ((), first.iteration.sequences)
    scheduler.finish_iteration(done(second, finished=("b",)))
    assert start(scheduler).iteration.left == second.iteration.sequences


def test_who_left_is_told_again_when_the_iteration_that_said_so_is_lost() -> None:
    scheduler = new_scheduler(token_budget=4)
    submit(scheduler, "a", "b", "c", prompt_length=4)
    a = start(scheduler).iteration
    scheduler.remove("a")
    b = start(scheduler).iteration
    assert b.left == a.sequences
    scheduler.lose_iteration(b.number)
    c = start(scheduler).iteration
    assert c.left == (*a.sequences, *b.sequences)
    scheduler.reset()
    submit(scheduler, "d")
    assert start(scheduler).iteration.left == (*a.sequences, *b.sequences, *c.sequences)


def test_a_sequence_is_registered_once_and_then_told_of_new_blocks_only() -> None:
    scheduler = new_scheduler(token_budget=4)
    submit(scheduler, "a", prompt_length=8)
    first, second = start(scheduler).iteration, start(scheduler).iteration
    assert [each.task_id for each in first.begins] == ["a"]
    assert [(new.first, len(new.blocks)) for new in first.new_blocks] == [(0, 2)]
    assert (second.begins, second.new_blocks) == ((), ())
    scheduler.finish_iteration(IterationDone(iteration=first.number))
    token = SampledToken(sequence=first.sequences[0], token=9, finished=False)
    scheduler.finish_iteration(IterationDone(iteration=second.number, tokens=(token,)))
    third = start(scheduler).iteration
    assert [(new.first, len(new.blocks)) for new in third.new_blocks] == [(2, 1)]


@pytest.mark.parametrize(("num_rows_ahead", "told"), [(0, (0,)), (1, (0, 1))])
def test_stages_that_run_ahead_get_the_next_block_early(num_rows_ahead: int, told: tuple[int, ...]) -> None:
    scheduler = new_scheduler(num_in_flight=1, num_rows_ahead=num_rows_ahead)
    submit(scheduler, "a", prompt_length=BLOCK_SIZE)
    (new,) = start(scheduler).iteration.new_blocks
    assert new.blocks == told


def test_a_cancel_in_mid_flight_frees_the_blocks_and_the_late_token_is_ignored() -> None:
    scheduler = new_scheduler()
    submit(scheduler, "a", "b")
    first = start(scheduler)
    assert scheduler.remove("a")
    assert scheduler.blocks.num_free == 7
    assert scheduler.finish_iteration(done(first)) == []
    assert (scheduler.num_running, scheduler.blocks.num_free) == (1, 7)
    assert rows(start(scheduler)) == [("b", 1)]
    assert not scheduler.remove("a")


def test_a_waiting_sequence_is_cancelled_without_ever_running() -> None:
    scheduler = new_scheduler(num_blocks=2)
    submit(scheduler, "a", "b")
    start(scheduler)
    assert len(scheduler.admission) == 1
    assert scheduler.remove("b")
    assert len(scheduler.admission) == 0


def test_the_expired_are_removed_wherever_they_are() -> None:
    scheduler = new_scheduler(num_blocks=4)
    submit(scheduler, "running", "waiting", max_tokens=12, now_s=0.0)
    submit(scheduler, "late enough", now_s=5.0)
    first = start(scheduler)
    assert [one.task_id for one in scheduler.expired(0.9)] == []
    assert [one.task_id for one in scheduler.expired(1.0)] == ["running", "waiting"]
    assert scheduler.blocks.num_free == 4
    assert rows(start(scheduler)) == [("late enough", 3)]
    assert scheduler.finish_iteration(done(first)) == []


def test_a_reset_returns_everything_and_leaves_nothing_in_flight() -> None:
    scheduler = new_scheduler(num_blocks=4)
    submit(scheduler, "a", "b", max_tokens=12)
    lost = start(scheduler)
    assert [one.task_id for one in scheduler.reset()] == ["a", "b"]
    assert (scheduler.num_running, len(scheduler.admission), scheduler.blocks.num_free) == (0, 0, 4)
    submit(scheduler, "c", "d", prompt_length=5, max_tokens=1)
    assert rows(start(scheduler)) == [("c", 5)]
    assert scheduler.finish_iteration(done(lost)) == []
    assert scheduler.next_iteration() is None, "there are blocks for c only"
    scheduler.remove("c")
    assert rows(start(scheduler)) == [("d", 5)]
    assert scheduler.next_iteration() is None


def test_unknown_iterations_are_ignored() -> None:
    scheduler = new_scheduler(num_in_flight=1)
    submit(scheduler, "a")
    first = start(scheduler)
    stranger = SampledToken(sequence=99, token=1, finished=True)
    assert scheduler.finish_iteration(IterationDone(iteration=77, tokens=(stranger,))) == []
    assert scheduler.next_iteration() is None
    scheduler.finish_iteration(done(first))
    assert scheduler.next_iteration() is not None


# Weights versions


def score(scheduler: NodeScheduler, *task_ids: str, version: int = 3, prompt_length: int = 3) -> None:
    """Deferrable tasks."""
    submit(
        scheduler,
        *task_ids,
        prompt_length=prompt_length,
        max_tokens=0,
        deferrable=True,
        weights_version=version,
    )


def test_sequences_go_on_with_the_newest_weights_unless_the_trainer_says_otherwise() -> None:
    scheduler = new_scheduler()
    submit(scheduler, "a")
    assert start(scheduler).iteration.version is None
    assert list(scheduler.versions_in_use) == []


def test_published_every_sequence_moves_on_with_the_next_iteration() -> None:
    scheduler = new_scheduler()
    assert scheduler.restored(4, "published") == []
    submit(scheduler, "a")
    first = start(scheduler)
    scheduler.versions.publish(9)
    assert list(scheduler.versions_in_use) == [4, 9]
    scheduler.finish_iteration(done(first))
    second = start(scheduler)
    assert (first.iteration.version, second.iteration.version) == (4, 9)
    assert list(scheduler.versions_in_use) == [9]


def test_pinned_a_sequence_ends_with_the_version_that_it_began_with() -> None:
    scheduler = new_scheduler()
    scheduler.restored(4, "pinned")
    submit(scheduler, "old")
    first = start(scheduler)
    scheduler.versions.publish(5)
    submit(scheduler, "new")
    second = start(scheduler)
    assert (rows(first), first.iteration.version) == ([("old", 3)], 4)
    assert (rows(second), second.iteration.version) == ([("new", 3)], 5)
    scheduler.finish_iteration(done(first))
    third = start(scheduler)
    assert (rows(third), third.iteration.version) == ([("old", 1)], 4)
    assert list(scheduler.versions_in_use) == [4, 5]
    scheduler.finish_iteration(done(third, finished=("old",)))
    assert list(scheduler.versions_in_use) == [5]


def test_a_version_is_in_use_until_the_last_iteration_with_it_has_come_back() -> None:
    scheduler = new_scheduler()
    scheduler.restored(4, "pinned")
    submit(scheduler, "a")
    first = start(scheduler)
    scheduler.versions.publish(5)
    scheduler.remove("a")
    assert list(scheduler.versions_in_use) == [4]
    scheduler.finish_iteration(done(first))
    assert list(scheduler.versions_in_use) == []


def test_versions_take_turns_even_while_one_of_them_prefills() -> None:
    scheduler = new_scheduler(num_in_flight=1, token_budget=4)
    scheduler.restored(1, "pinned")
    submit(scheduler, "long", prompt_length=12)
    turns = [start(scheduler)]
    scheduler.versions.publish(2)
    submit(scheduler, "short")
    for _ in range(4):
        scheduler.finish_iteration(done(turns[-1]))
        turns.append(start(scheduler))
    assert [turn.iteration.version for turn in turns] == [1, 2, 1, 2, 1]


def test_a_restore_ends_what_wants_other_weights_and_nothing_else() -> None:
    scheduler = new_scheduler()
    scheduler.restored(4, "pinned")
    submit(scheduler, "old")
    start(scheduler)
    scheduler.versions.publish(5)
    submit(scheduler, "new")
    start(scheduler)
    submit(scheduler, "waiting", prompt_length=30, max_tokens=3)
    score(scheduler, "scored", version=5)
    assert [one.task_id for one in scheduler.restored(4, "pinned")] == ["new", "scored"]
    assert (scheduler.num_running, len(scheduler.admission)) == (1, 1)


def test_a_restore_to_other_weights_of_the_same_number_ends_what_was_pinned_to_it() -> None:
    scheduler = new_scheduler()
    scheduler.restored(4, "pinned")
    submit(scheduler, "old")
    start(scheduler)
    submit(scheduler, "waiting", prompt_length=30, max_tokens=3)
    score(scheduler, "scored", version=4)
    assert [one.task_id for one in scheduler.restored(4, "pinned", is_same=False)] == ["old", "scored"]
    assert len(scheduler.admission) == 1


def test_sequences_of_the_newest_weights_are_pinned_by_the_first_restore() -> None:
    scheduler = new_scheduler()
    submit(scheduler, "a")
    first = start(scheduler)
    assert scheduler.restored(0, "pinned") == []
    scheduler.versions.publish(1)
    scheduler.finish_iteration(done(first))
    assert start(scheduler).iteration.version == 0


def test_a_lost_iteration_takes_its_own_sequences_along() -> None:
    scheduler = new_scheduler()
    submit(scheduler, "a", "b", prompt_length=4)
    lost = start(scheduler)
    submit(scheduler, "c")
    start(scheduler)
    assert [one.task_id for one in scheduler.lose_iteration(lost.iteration.number)] == ["a", "b"]
    assert scheduler.lose_iteration(lost.iteration.number) == []
    assert scheduler.num_running == 1
    submit(scheduler, "d")
    assert rows(start(scheduler)) == [("d", 3)]


# Deferrable tasks


def test_deferrable_tasks_run_where_no_request_can_and_one_iteration_at_a_time() -> None:
    scheduler = new_scheduler(num_in_flight=1)
    submit(scheduler, "a")
    score(scheduler, "x", "y", "z")
    first = start(scheduler)
    assert (rows(first), first.iteration.deferrable) == ([("a", 3)], False)
    scoring = start(scheduler)
    assert (rows(scoring), scoring.iteration.deferrable, scoring.iteration.version) == (
        [("x", 3), ("y", 3)],
        True,
        3,
    )
    assert (scoring.iteration.produces, scoring.iteration.new_blocks) == ((True, True), ())
    assert scheduler.next_iteration() is None
    scheduler.finish_iteration(done(first))
    assert rows(start(scheduler)) == [("a", 1)]
    completed = scheduler.finish_iteration(done(scoring, finished=("x", "y")))
    assert [one.task_id for one in completed] == ["x", "y"]
    assert rows(start(scheduler)) == [("z", 3)]


def test_deferrable_tasks_of_two_versions_share_no_iteration() -> None:
    scheduler = new_scheduler()
    score(scheduler, "x", version=3)
    score(scheduler, "y", version=4)
    first = start(scheduler)
    assert (rows(first), first.iteration.version) == ([("x", 3)], 3)
    scheduler.finish_iteration(done(first, finished=("x",)))
    assert start(scheduler).iteration.version == 4


def test_a_deferrable_prompt_longer_than_an_iteration_runs_whole() -> None:
    scheduler = new_scheduler(token_budget=4)
    score(scheduler, "long", prompt_length=9)
    assert rows(start(scheduler)) == [("long", 9)]


def test_deferrable_tasks_that_cannot_run_whole_are_refused() -> None:
    scheduler = new_scheduler()
    with pytest.raises(RefusedError, match="at most 10 tokens"):
        score(scheduler, "x", prompt_length=11)
    with pytest.raises(RefusedError, match="max_tokens must be 0"):
        submit(scheduler, "x", deferrable=True)
    score(scheduler, *(f"x{number}" for number in range(64)))
    with pytest.raises(RefusedError, match="64 deferrable tasks"):
        score(scheduler, "one more")


def test_deferrable_tasks_can_be_removed_expire_and_are_reset() -> None:
    scheduler = new_scheduler()
    score(scheduler, "x", "y", "z")
    scoring = start(scheduler)
    assert scheduler.remove("x")
    assert [one.task_id for one in scheduler.expired(1.0)] == ["y", "z"]
    assert scheduler.finish_iteration(done(scoring, finished=("x", "y"))) == []
    score(scheduler, "u")
    assert [one.task_id for one in scheduler.reset()] == ["u"]
