"""Sizes of work, against counting."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.profiles.profile import profile_named, stage_times
from shared.profiles.times import NO_WORK, Work, work_of_rows

Chunk = tuple[int, int]
"""(start, number of rows) of one sequence."""

CHUNKS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), max_size=8)


def work_of(chunks: list[Chunk]) -> Work:
    return sum((work_of_rows(start, num_tokens) for start, num_tokens in chunks), NO_WORK)


def counted(chunks: list[Chunk]) -> Work:
    """By going through every row of every sequence, and noting each position that it attends to."""
    attended = [
        (sequence, row, position)
        for sequence, (start, num_tokens) in enumerate(chunks)
        for row in range(start, start + num_tokens)
        for position in range(row + 1)
    ]
    rows = {(sequence, row) for sequence, row, _ in attended}
    read = {(sequence, position) for sequence, _, position in attended}
    return Work(len(rows), len(attended), len(chunks), len(read))


@given(CHUNKS)
def test_work_is_what_counting_gives_whatever_shares_an_iteration(chunks: list[Chunk]) -> None:
    """A start after 0 is a prompt's later piece, a decode, or a prompt behind a hit of the prefix cache."""
    assert work_of(chunks) == counted(chunks)


@given(CHUNKS, CHUNKS)
def test_work_adds_up(ours: list[Chunk], others: list[Chunk]) -> None:
    assert work_of(ours) + work_of(others) == work_of(ours + others)


@given(CHUNKS, st.integers(0, 5))
def test_times_a_number_is_so_many_alike(chunks: list[Chunk], count: int) -> None:
    assert work_of(chunks) * count == work_of(chunks * count)


@pytest.mark.parametrize(
    ("name", "start", "num_tokens"),
    [("llama2-13b@a100", 1536, 400), ("gpt2-large@rtx6000ada", 512, 400)],
)
@pytest.mark.parametrize("source", ["device", "fit"])
def test_a_late_piece_costs_the_same_beside_a_decode(
    name: str, start: int, num_tokens: int, source: str
) -> None:
    piece, decode = work_of_rows(start, num_tokens), work_of_rows(99, 1)
    for stage in range(2):
        seconds = _seconds(name, stage, source)
        increment_s = seconds(piece + decode) - seconds(piece)
        assert 0 <= increment_s <= seconds(decode)


def _seconds(name: str, stage: int, source: str) -> Callable[[Work], float]:
    fitted = profile_named(name, 2).stages[stage].fitted("iteration")
    assert fitted is not None
    return stage_times(name, stage, 2).iteration_s if source == "device" else fitted.seconds
