"""The waiting line against a sorted list."""

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.waiting_line import WaitingLine

JOIN = st.tuples(st.sampled_from("abcdefgh"), st.integers(-2, 2), st.floats(0, 10, allow_nan=False))
LEAVE = st.sampled_from("abcdefgh")


@given(st.lists(st.one_of(JOIN, LEAVE), max_size=30))
def test_the_most_urgent_goes_first_and_then_who_came_earlier(
    events: list[tuple[str, int, float] | str],
) -> None:
    line, plain = WaitingLine(), dict[str, tuple[int, float, str]]()
    for event in events:
        if isinstance(event, str):
            line.leave(event)
            plain.pop(event, None)
        else:
            task_id, priority, arrived_s = event
            line.join(task_id, priority, arrived_s)
            plain.setdefault(task_id, (priority, arrived_s, task_id))
        assert len(line) == len(plain)
        assert line.first == (min(plain.values())[2] if plain else None)
        assert all((task_id in line) == (task_id in plain) for task_id in "abcdefgh")
