"""Looks at who is silent come only when this process has been listening."""

from contextlib import aclosing

from shared.clock import on_time


class GivenClock:
    """Tells the given times, one after the other."""

    def __init__(self, *times_s: float) -> None:
        self.left_s = list(times_s)

    def now_s(self) -> float:
        return self.left_s.pop(0)

    def wall_s(self) -> float:
        return self.now_s()


async def test_a_look_that_comes_late_is_left_out() -> None:
    punctual, late, again = (0.0, 0.5), (0.5, 3.5), (3.5, 4.5)
    clock = GivenClock(*punctual, *late, *again)
    async with aclosing(on_time(0.0, at_most_late_s=1.0, clock=clock)) as looks:
        await anext(looks)
        assert clock.left_s == [*late, *again]
        await anext(looks)
    assert clock.left_s == []
