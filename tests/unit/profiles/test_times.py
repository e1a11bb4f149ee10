"""Sizes of work, against counting."""

import pytest

from shared.profiles.times import NO_WORK, Work, work_of_rows


def work_of(*chunks: tuple[int, int]) -> Work:
    return sum((work_of_rows(start, num_tokens) for start, num_tokens in chunks), NO_WORK)


@pytest.mark.parametrize(("start", "num_tokens"), [(0, 1), (0, 7), (5, 1), (5, 7)])
def test_each_row_attends_to_all_before_it_and_to_itself(start: int, num_tokens: int) -> None:
    pairs = sum(position + 1 for position in range(start, start + num_tokens))
    assert work_of_rows(start, num_tokens) == Work(num_tokens, pairs, 1)


@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 1)],
        [(0, 200)],
        [(100, 50)],
        [(10, 1), (500, 1), (3, 1)],
        [(10, 1), (500, 1), (0, 80)],
        [(0, 50)] * 6,
    ],
)
def test_context_is_each_sequence_s_length(chunks: list[tuple[int, int]]) -> None:
    assert work_of(*chunks).context_tokens == sum(start + num_tokens for start, num_tokens in chunks)


def test_context_of_nothing_is_nothing() -> None:
    assert NO_WORK.context_tokens == 0


def test_context_of_two_prompts_among_others_is_not_below_the_rows() -> None:
    work = work_of((0, 150), (0, 90), (40, 1))
    assert work.num_tokens <= work.context_tokens <= 150 + 90 + 41
