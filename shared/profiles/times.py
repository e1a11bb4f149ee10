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

    @property
    def context_tokens(self) -> float:
        """Positions whose keys are read, each sequence's once, as far as the other numbers tell.

        Exact for one sequence, for decoding, and for decoding together with one whole prompt; else at least
        the rows themselves, or what sequences of equal numbers of rows would have on average.
        """
        tokens, pairs, sequences = self.num_tokens, self.num_pairs, self.num_sequences
        if sequences <= 1:
            return pairs / tokens + (tokens - 1) / 2 if tokens else 0.0
        prompt = tokens - sequences + 1
        cached_pairs = pairs - prompt * (prompt + 1) / 2
        if cached_pairs >= sequences - 1:
            return prompt + cached_pairs
        return max(tokens, pairs * sequences / tokens)

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.num_tokens + other.num_tokens,
            self.num_pairs + other.num_pairs,
            self.num_sequences + other.num_sequences,
        )


def work_of_rows(start: int, num_tokens: int) -> Work:
    """Rows at positions start .. start + num_tokens - 1 of one sequence."""
    return Work(num_tokens, num_tokens * start + num_tokens * (num_tokens + 1) // 2, 1)


NO_WORK = Work(0, 0, 0)


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
