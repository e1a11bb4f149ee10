"""How the last stage goes on with a sequence."""

import pytest

from services.stage_worker.compute.sampling.sequences import SequenceState
from shared.messages.inference import Sampling


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
