"""What goes into the next iteration, and what every stage is told of it."""

import pytest

from services.stage_worker.node.batcher import Sequence, chunk_of, form_iteration, tokens_of
from shared.messages.inference import InferenceTask, Sampling
from tests.unit.stage_worker.support import sequence


def formed(
    sequences: list[Sequence],
    *,
    token_budget: int = 16,
    num_in_flight: int = 1,
    num_decoding: int | None = None,
) -> list[tuple[str, int]]:
    decoding = sum(one.is_decoding for one in sequences) if num_decoding is None else num_decoding
    rows = form_iteration(
        sequences, num_decoding=decoding, num_in_flight=num_in_flight, token_budget=token_budget
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


def test_a_long_prompt_goes_in_pieces_that_fill_the_budget() -> None:
    long = sequence("p", prompt_length=10)
    sizes = []
    while not long.is_decoding:
        ((_, num_tokens),) = formed([long], token_budget=4)
        sizes.append(num_tokens)
        long.num_cached += num_tokens
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize(
    ("num_decoding", "num_in_flight", "share"), [(4, 1, 4), (4, 2, 2), (5, 2, 3), (1, 4, 1), (7, 3, 3)]
)
def test_an_iteration_takes_its_share_of_the_decodes(
    num_decoding: int, num_in_flight: int, share: int
) -> None:
    sequences = [decoding(f"d{i}") for i in range(num_decoding)]
    assert len(formed(sequences, num_in_flight=num_in_flight)) == share


def test_decodes_in_flight_count_for_the_share() -> None:
    sequences = [decoding(f"d{i}") for i in range(4)]
    assert len(formed(sequences, num_in_flight=2, num_decoding=8)) == 4


def test_a_chunk_knows_its_place_its_blocks_and_whether_a_token_follows() -> None:
    one = sequence(prompt_length=6, max_tokens=4)
    one.blocks = (7, 3, 5)
    first = chunk_of(one, 4, block_size=4)
    assert (first.start, first.num_tokens, first.blocks, first.produces) == (0, 4, (7,), False)
    assert tokens_of(one, 4) == (0, 1, 2, 3)
    one.num_cached = 4
    second = chunk_of(one, 2, block_size=4)
    assert (second.start, second.num_tokens, second.blocks, second.produces) == (4, 2, (7, 3), True)
    assert tokens_of(one, 2) == (4, 5)


def test_a_decode_feeds_back_the_newest_token() -> None:
    one = sequence(num_cached=5)
    one.generated = [11, 12, 13]
    one.blocks = (0, 1)
    chunk = chunk_of(one, 1, block_size=4)
    assert tokens_of(one, 1) == (13,)
    assert (chunk.start, chunk.index, chunk.produces, chunk.blocks) == (5, 3, True, (0, 1))


def test_targets_are_the_prompt_tokens_that_follow_the_rows() -> None:
    wanted = InferenceTask(
        task_id="a",
        gateway="g",
        prompt=(5, 6, 7, 8, 9),
        sampling=Sampling(max_tokens=1),
        prompt_logprobs=True,
        timeout_s=1.0,
    )
    one = Sequence(task=wanted, deadline_s=1.0, traceparent="", blocks=(0, 1))
    assert chunk_of(one, 3, block_size=4).targets == (6, 7, 8)
    one.num_cached = 3
    assert chunk_of(one, 2, block_size=4).targets == (9,)
    one.num_cached, one.generated = 5, [1]
    assert chunk_of(one, 1, block_size=4).targets == ()
