"""The ops of stages and their times: they correct the scheduler's forecast, and measure its error."""

from typing import Literal

from shared.messages.base import Message
from shared.profiles.times import Work

OpKind = Literal["iteration", "forward", "backward", "step"]
"""`iteration`: inference. `forward` and `backward`: of a training microbatch; on the last stage its
`forward` includes its backward. `step`: the optimizer's."""


class StageOp(Message):
    """One thing that a stage does. A training op stands aside for iterations, between two of its slices."""

    kind: OpKind
    task_ids: tuple[str, ...]
    """The sequences of an iteration; else the one training batch."""
    index: int
    """The iteration's number on its node; else the microbatch's in its batch (0 for a step)."""
    num_tokens: int
    """Rows; 0 for a step."""
    num_pairs: int
    """Sum over rows of the positions that each attends to, its own included."""
    num_sequences: int
    num_context_tokens: int
    """Positions whose keys and values are read, each sequence's once, its new rows included."""

    @property
    def work(self) -> Work:
        """Its size."""
        return Work(self.num_tokens, self.num_pairs, self.num_sequences, self.num_context_tokens)


class OpEnded(Message):
    """An op is over."""

    op: StageOp
    elapsed_s: float
    """Seconds that it had the device for, without waiting in line."""
    ago_s: float
    """Between its end and the sending of this message."""
    given_way_s: float = 0.0
    """Seconds between its start and its end in which it stood aside."""


class OpStarted(Message):
    """An op is running."""

    op: StageOp
    ago_s: float
    """Between its start and the sending of this message."""
    given_way_s: float = 0.0
    """Seconds of these in which it stood aside."""


class StageProgress(Message):
    """The ops that a stage has done since its last message, and those it does now. stage -> scheduler."""

    node: int
    stage: int
    ended: tuple[OpEnded, ...]
    """In the order of their ends."""
    running: OpStarted | None
    aside: OpStarted | None = None
    """The training op that stands aside, on this stage, for what its device does now."""
