"""When an answer counts as in time."""

from collections.abc import Sequence

import pytest

from services.gateway.punctuality import ChoiceTimes, is_in_time
from shared.messages.inference import Placed

ARRIVED_S = 100.0
DUE = Placed(node=0, ttft_s=1.0, tbt_s=0.5)


def times(ttft_s: float, gaps_s: Sequence[float] = ()) -> ChoiceTimes:
    """A choice whose tokens came so."""
    choice, at_s = ChoiceTimes(), ARRIVED_S + ttft_s
    choice.add(at_s, ARRIVED_S)
    for gap_s in gaps_s:
        at_s += gap_s
        choice.add(at_s, ARRIVED_S)
    return choice


@pytest.mark.parametrize(
    ("choice", "due", "in_time"),
    [
        (times(1.0), DUE, True),
        (times(1.25), DUE, False),
        (times(1.0, [0.5] * 10), DUE, True),
        (times(1.0, [0.75]), DUE, False),
        (times(1.0, [0.5] * 99 + [8.0]), DUE, True),
        (times(1.0, [0.5] * 98 + [8.0]), DUE, False),
        (times(1.0, [8.0]), Placed(node=0, ttft_s=1.0), True),
        (times(1.0), Placed(node=0), None),
        (times(1.0), None, None),
        (ChoiceTimes(), DUE, None),
    ],
)
def test_the_first_token_counts_and_the_p99_between_tokens(
    choice: ChoiceTimes, due: Placed | None, in_time: bool | None
) -> None:
    assert is_in_time([choice], [due]) is in_time


def test_a_request_is_in_time_when_all_its_choices_are() -> None:
    kept, late = times(0.5), times(2.0)
    assert is_in_time([kept, kept], [DUE, DUE]) is True
    assert is_in_time([kept, late], [DUE, DUE]) is False
    assert is_in_time([kept, late], [DUE, Placed(node=0, ttft_s=2.0)]) is True
    assert is_in_time([kept, late], [DUE, None]) is None
