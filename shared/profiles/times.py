"""How long a stage takes for a piece of work: what emulated devices, costs and profiles speak of."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Work:
    """The size of one op; see `shared.messages.events.StageOp`."""

    num_tokens: int
    """Rows that go through the stage."""
    num_pairs: int
    """Sum over rows of the positions that each attends to, its own included."""
    num_sequences: int
    num_context_tokens: int
    """Positions whose keys and values are read, each sequence's once, its new rows included."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.num_tokens + other.num_tokens,
            self.num_pairs + other.num_pairs,
            self.num_sequences + other.num_sequences,
            self.num_context_tokens + other.num_context_tokens,
        )

    def __mul__(self, count: int) -> "Work":
        """So many times the same, as one op."""
        return Work(
            self.num_tokens * count,
            self.num_pairs * count,
            self.num_sequences * count,
            self.num_context_tokens * count,
        )


def work_of_rows(start: int, num_tokens: int) -> Work:
    """Rows at positions start .. start + num_tokens - 1 of one sequence."""
    num_pairs = num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return Work(num_tokens, num_pairs, 1, start + num_tokens)


NO_WORK = Work(0, 0, 0, 0)


class StageTimes(Protocol):
    """Seconds that ops take on one stage of one node."""

    def iteration_s(self, work: Work) -> float:
        """An inference iteration, the last stage's logits and sampling included."""
        ...

    def forward_s(self, work: Work) -> float:
        """A training forward."""
        ...

    def backward_s(self, work: Work) -> float:
        """A training backward."""
        ...

    def step_s(self) -> float:
        """The optimizer's step on this stage's weights."""
        ...
