"""What a stage knows of sequences, and what it makes of the iterations that name them."""

from typing import Any

import pytest

from services.stage_worker.compute.executor import SequenceChunk
from services.stage_worker.compute.sampling.sequences import SequenceState
from services.stage_worker.pipeline.sequences import SequenceTable
from shared.errors import MalformedMessageError, UnknownSequenceError
from shared.messages.inference import Iteration, NewBlocks, Sampling, SequenceStart

PROMPT = (5, 6, 7, 8, 9)


def start_of(number: int, **fields: Any) -> SequenceStart:
    sampling = Sampling(max_tokens=4)
    facts = {"task_id": f"t{number}", "gateway": "g", "sampling": sampling, "num_prompt_tokens": 5}
    return SequenceStart(sequence=number, **{**facts, **fields})


def piece(number: int, start: int, count: int, *, produces: bool = False, **fields: Any) -> Iteration:
    """An iteration of one sequence."""
    return Iteration(
        number=0, sequences=(number,), starts=(start,), counts=(count,), produces=(produces,), **fields
    )


def new_blocks(first: int, *blocks: int) -> tuple[NewBlocks, ...]:
    return (NewBlocks(place=0, first=first, blocks=blocks),)


def only_chunk(table: SequenceTable, iteration: Iteration) -> SequenceChunk:
    (chunk,) = table.enter(iteration).chunks
    return chunk


def test_a_sequence_is_registered_once_and_its_blocks_grow() -> None:
    table = SequenceTable(None, block_size=4)
    begin = (start_of(7, traceparent="trace"),)
    first = only_chunk(table, piece(7, 0, 4, begins=begin, new_blocks=new_blocks(0, 3, 9)))
    assert (first.task_id, first.start, first.num_tokens, list(first.blocks)) == ("t7", 0, 4, [3, 9])
    assert (first.produces, first.index, first.traceparent) == (False, 0, "trace")
    last = only_chunk(table, piece(7, 4, 1, produces=True))
    assert (last.produces, last.index, last.traceparent) == (True, 0, "trace")
    decode = only_chunk(table, piece(7, 5, 1, produces=True, new_blocks=new_blocks(2, 4)))
    assert (list(decode.blocks), decode.index, decode.traceparent) == ([3, 9, 4], 1, "")


def test_the_row_of_a_token_that_could_not_be_drawn_may_come_again() -> None:
    table = SequenceTable(None, block_size=4)
    table.enter(piece(7, 0, 5, produces=True, begins=(start_of(7),)))
    assert only_chunk(table, piece(7, 4, 1, produces=True)).index == 0


def test_a_sequence_without_its_blocks_begins_anew_with_others() -> None:
    table = SequenceTable(None, block_size=4)
    table.enter(piece(7, 0, 5, produces=True, begins=(start_of(7),), new_blocks=new_blocks(0, 1, 2)))
    again = only_chunk(table, piece(7, 0, 6, produces=True, new_blocks=new_blocks(0, 8, 9)))
    assert (list(again.blocks), again.index) == ([8, 9], 1)


def test_only_the_last_stage_knows_how_tokens_are_drawn() -> None:
    begun: list[str] = []

    def begin(start: SequenceStart) -> SequenceState:
        begun.append(start.task_id)
        return SequenceState(start.gateway, start.sampling)

    table = SequenceTable(begin, block_size=4)
    (state,) = table.enter(piece(7, 0, 4, begins=(start_of(7),))).states
    assert table.enter(piece(7, 4, 1, produces=True)).states == (state,)
    assert begun == ["t7"]
    assert SequenceTable(None, block_size=4).enter(piece(7, 0, 4, begins=(start_of(7),))).states == ()


def test_a_scored_prompt_has_its_targets_once() -> None:
    table = SequenceTable(None, block_size=4)
    begin = (start_of(7, prompt=PROMPT, prompt_logprobs=True),)
    assert only_chunk(table, piece(7, 0, 3, begins=begin, new_blocks=new_blocks(0, 1))).targets == (6, 7, 8)
    assert only_chunk(table, piece(7, 3, 2, produces=True)).targets == (9,)
    assert only_chunk(table, piece(7, 4, 1, produces=True)).targets == ()
    assert only_chunk(table, piece(7, 5, 1, produces=True)).targets == ()
    assert only_chunk(table, piece(7, 0, 6, produces=True, new_blocks=new_blocks(0, 2))).targets == ()


def test_who_has_left_is_forgotten_and_nobody_else() -> None:
    table = SequenceTable(None, block_size=4)
    table.enter(piece(7, 0, 5, begins=(start_of(7),)))
    table.enter(piece(8, 0, 5, begins=(start_of(8),), left=(7, 99)))
    assert len(table) == 1
    with pytest.raises(UnknownSequenceError, match="the beginning of sequence 7 never came"):
        table.enter(piece(7, 5, 1, produces=True))
    table.enter(piece(8, 5, 1, produces=True))


def test_rows_that_never_came_are_noticed() -> None:
    table = SequenceTable(None, block_size=4)
    table.enter(piece(7, 0, 2, begins=(start_of(7),)))
    with pytest.raises(UnknownSequenceError, match="rows 2 to 3 of t7 never came"):
        table.enter(piece(7, 4, 1, produces=True))


def test_a_sequence_may_begin_behind_rows_that_another_has_filled_here() -> None:
    table = SequenceTable(None, block_size=4)
    table.enter(piece(7, 0, 5, begins=(start_of(7),), new_blocks=new_blocks(0, 1, 2)))
    entered = table.enter(piece(8, 4, 1, begins=(start_of(8),), new_blocks=new_blocks(0, 1, 3)))
    assert (entered.chunks[0].start, list(entered.chunks[0].blocks)) == (4, [1, 3])
    assert (entered.num_cached, table.enter(piece(8, 5, 1)).num_cached) == ((4,), (4,))
    assert table.enter(piece(7, 5, 1)).num_cached == (0,)
    with pytest.raises(UnknownSequenceError, match="the beginning of t9 is not in this cache"):
        table.enter(piece(9, 4, 1, begins=(start_of(9),), new_blocks=new_blocks(0, 5, 6)))


def test_an_iteration_whose_columns_do_not_fit_together_is_malformed() -> None:
    good = piece(7, 0, 2)
    for wrong in (good.pack().replace(b"\xa6starts\x91\x00", b"\xa6starts\x90"),):
        with pytest.raises(MalformedMessageError, match="differ in length"):
            Iteration.unpack(wrong)
    with pytest.raises(ValueError, match="no sequence of the iteration"):
        piece(7, 0, 2, new_blocks=(NewBlocks(place=1, first=0, blocks=(1,)),))
