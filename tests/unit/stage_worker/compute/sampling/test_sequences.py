"""What the last stage remembers of sequences."""

from typing import Any

import pytest

from services.stage_worker.compute.sampling.sequences import SequenceState, SequenceTable
from shared.errors import UnknownSequenceError
from shared.messages.inference import Sampling, SequenceChunk, SequenceStart


def table() -> SequenceTable:
    return SequenceTable(lambda start: SequenceState(start.gateway, start.sampling))


def chunk(task_id: str, *, begins: bool = False, produces: bool = True, **fields: Any) -> SequenceChunk:
    sampling = Sampling(max_tokens=fields.pop("max_tokens", 4), repetition_penalty=2.0)
    return SequenceChunk(
        task_id=task_id,
        begins=SequenceStart(gateway="g", sampling=sampling) if begins else None,
        start=0,
        num_tokens=1,
        blocks=(0,),
        produces=produces,
        **fields,
    )


def test_a_sequence_is_known_from_its_first_chunk_until_it_leaves() -> None:
    it = table()
    (first,) = it.enter([chunk("a", begins=True, produces=False, tokens=(1, 2))], ())
    first.drew(9)
    (second,) = it.enter([chunk("a", tokens=(3,))], ())
    assert second is first
    assert (second.prompt, dict(second.generated)) == ({1, 2, 3}, {9: 1})
    it.enter([chunk("b", begins=True)], ("a", "never seen"))
    assert len(it) == 1
    with pytest.raises(UnknownSequenceError, match="the beginning of a never came"):
        it.enter([chunk("a")], ())


def test_a_prompt_that_is_only_scored_at_once_is_not_remembered() -> None:
    it = table()
    assert len(it.enter([chunk("a", begins=True, max_tokens=0)], ())) == 1
    assert len(it) == 0
    it.enter([chunk("b", begins=True, produces=False, max_tokens=0)], ())
    assert len(it) == 1


@pytest.mark.parametrize(
    ("token", "index", "expected"), [(7, 0, "stop"), (7, 2, "stop"), (1, 2, "length"), (1, 1, None)]
)
def test_a_stop_token_or_the_last_one_ends_the_answer(token: int, index: int, expected: str | None) -> None:
    state = SequenceState("g", Sampling(max_tokens=3, stop_token_ids=(7, 8)))
    assert state.finish_reason(token, index) == expected


def test_draws_are_counted_only_for_who_looks_at_them() -> None:
    state = SequenceState("g", Sampling(max_tokens=4))
    state.drew(3)
    assert not state.generated
