"""What goes into the next iteration, and what every stage is told of it."""

from typing import Any

import pytest
from msgspec import structs

from services.stage_worker.node.batcher import MAX_STARTING_BYTES, form_iteration, form_scoring, new_blocks_of
from services.stage_worker.node.sequence import Sequence
from shared.messages.inference import NewBlocks, Pace
from tests.unit.stage_worker.support import sequence


def formed(
    sequences: list[Sequence], *, token_budget: int = 16, most_decodes: int = 99
) -> list[tuple[str, int]]:
    rows = form_iteration(
        [one for one in sequences if one.is_decoding],
        [one for one in sequences if not one.is_decoding],
        most_decodes=most_decodes,
        token_budget=token_budget,
    )
    return [(one.task.task_id, num_tokens) for one, num_tokens in rows]


def decoding(name: str) -> Sequence:
    return sequence(name, num_cached=3)


def test_nothing_gives_nothing() -> None:
    assert formed([]) == []


def test_decodes_go_before_prompts() -> None:
    sequences = [sequence("prompt", prompt_length=5), decoding("d0"), decoding("d1")]
    assert formed(sequences) == [("d0", 1), ("d1", 1), ("prompt", 5)]


def test_prompts_get_what_decodes_leave_of_the_budget() -> None:
    sequences = [decoding("d"), sequence("p0", prompt_length=5), sequence("p1", prompt_length=5)]
    assert formed(sequences, token_budget=8) == [("d", 1), ("p0", 5), ("p1", 2)]


def test_decodes_may_take_the_whole_budget() -> None:
    sequences = [decoding(f"d{i}") for i in range(3)] + [sequence("p")]
    assert formed(sequences, token_budget=2) == [("d0", 1), ("d1", 1)]


def test_an_iteration_takes_no_more_decodes_than_its_share() -> None:
    sequences = [decoding(f"d{i}") for i in range(4)] + [sequence("p")]
    assert formed(sequences, most_decodes=2) == [("d0", 1), ("d1", 1), ("p", 3)]


def test_a_long_prompt_goes_in_pieces_that_fill_the_budget() -> None:
    long = sequence("p", prompt_length=10)
    sizes = []
    while long.num_left:
        ((_, num_tokens),) = formed([long], token_budget=4)
        sizes.append(num_tokens)
        long.num_cached += num_tokens
    assert sizes == [4, 4, 2]


def careful(name: str, rows_beside_decodes: int) -> Sequence:
    one = sequence(name, prompt_length=10)
    one.task = structs.replace(one.task, pace=Pace(rows_beside_decodes=rows_beside_decodes))
    return one


def test_beside_decodes_prompts_have_no_more_rows_together_than_each_allows() -> None:
    usual = sequence("p", prompt_length=10)
    assert formed([decoding("d"), careful("c", 4), usual]) == [("d", 1), ("c", 4)]
    assert formed([decoding("d"), sequence("p", prompt_length=3), careful("c", 4)]) == [
        ("d", 1),
        ("p", 3),
        ("c", 1),
    ]
    assert formed([careful("c", 4)]) == [("c", 10)]


def test_no_more_sequences_begin_together_than_a_message_carries() -> None:
    large = structs.replace(sequence().task.sampling, grammar="x" * (MAX_STARTING_BYTES // 2 + 1))
    sequences = [sequence(name) for name in "abc"]
    for one in sequences[:2]:
        one.task = structs.replace(one.task, sampling=large)
    assert formed(sequences) == [("a", 3), ("c", 3)]
    sequences[0].has_begun = True
    assert formed(sequences) == [("a", 3), ("b", 3), ("c", 3)]


def test_whole_prompts_are_scored_together_as_far_as_they_fit() -> None:
    sequences = [sequence(name, prompt_length=3) for name in "abc"]
    assert [one.task.task_id for one, _ in form_scoring(sequences, token_budget=6)] == ["a", "b"]
    assert [count for _, count in form_scoring(sequences, token_budget=2)] == [3]


def test_the_tokens_of_rows_are_those_of_the_prompt_and_then_those_generated() -> None:
    one = sequence(prompt_length=6)
    assert one.next_tokens(4) == (0, 1, 2, 3)
    one.num_cached = 4
    assert (one.next_tokens(2), one.num_left) == ((4, 5), 2)
    one.num_cached, one.generated = 6, [11]
    assert (one.next_tokens(1), one.is_decoding) == ((11,), True)
    one.generated = [11, 12, 13]
    one.num_cached = 0
    assert (one.next_tokens(9), one.is_decoding) == ((0, 1, 2, 3, 4, 5, 11, 12, 13), False)
    one.num_cached = 7
    assert one.next_tokens(2) == (12, 13)
    one.num_cached = 4
    assert one.next_tokens(3) == (4, 5, 11)


def test_stages_are_told_of_blocks_that_they_do_not_know() -> None:
    known, grown, new = (sequence(name) for name in "abc")
    known.held.blocks, known.num_known_blocks = [1, 2], 2
    grown.held.blocks, grown.num_known_blocks = [3, 4, 5], 2
    new.held.blocks = [6]
    assert new_blocks_of([(known, 1), (grown, 1), (new, 3)]) == (
        NewBlocks(place=1, first=2, blocks=(5,)),
        NewBlocks(place=2, first=0, blocks=(6,)),
    )


@pytest.mark.parametrize(
    ("fields", "sampling", "is_sent"),
    [({}, {}, False), ({"prompt_logprobs": True}, {}, True), ({}, {"repetition_penalty": 2.0}, True)],
)
def test_the_prompt_goes_to_the_stages_only_where_the_last_one_needs_it(
    fields: dict[str, Any], sampling: dict[str, Any], is_sent: bool
) -> None:
    one = sequence(prompt_length=3)
    changed = structs.replace(one.task.sampling, **sampling)
    one.task = structs.replace(one.task, sampling=changed, **fields)
    start = one.as_start()
    assert (start.sequence, start.task_id, start.num_prompt_tokens) == (one.number, "a", 3)
    assert start.prompt == ((0, 1, 2) if is_sent else ())
    assert (one.start_bytes > 0) == is_sent
