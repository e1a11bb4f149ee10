"""Whether an answer came when it was due. Pure."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.messages.inference import Placed

LATE_SHARE = 0.01
"""So many of the times between the tokens of a choice may be longer than they should: their p99 counts."""


@dataclass(slots=True)
class ChoiceTimes:
    """When the tokens of one choice came, in seconds."""

    ttft_s: float | None = None
    """From the request's arrival to the first token; None: there is none yet."""
    last_s: float = 0.0
    """When the newest token came, on the clock of the arrivals."""
    gaps_s: "array[float]" = field(default_factory=lambda: array("d"))
    """From each token to the next."""

    def add(self, at_s: float, arrived_s: float) -> None:
        """Note the next token."""
        if self.ttft_s is None:
            self.ttft_s = at_s - arrived_s
        else:
            self.gaps_s.append(at_s - self.last_s)
        self.last_s = at_s


def is_in_time(choices: Sequence[ChoiceTimes], placed: Sequence[Placed | None]) -> bool | None:
    """Whether every choice kept the times that the scheduler gave it; None: of one nobody can say."""
    kept = [_is_kept(times, due) for times, due in zip(choices, placed, strict=True)]
    return None if None in kept else all(kept)


def _is_kept(times: ChoiceTimes, due: Placed | None) -> bool | None:
    if times.ttft_s is None or due is None or due.ttft_s is None:
        return None
    limit_s = due.tbt_s
    num_late = 0 if limit_s is None else sum(gap_s > limit_s for gap_s in times.gaps_s)
    return times.ttft_s <= due.ttft_s and num_late <= LATE_SHARE * len(times.gaps_s)
