"""A node's predicted future, and questions about it: when could something new run there. Pure."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from services.scheduler.node.known_work import FORWARD, Batch, KnownWork, Op


@dataclass(slots=True)
class Prediction:
    """The future of a node's stages. All lists are by stage; ops are in the order of their starts."""

    at_s: float
    ops: list[list[Op]]
    starts_s: list[list[float]]
    ends_s: list[list[float]]
    inference_ends_s: list[float]
    """When the last known iteration is over; `at_s` without any."""
    stage_ends_s: list[float]
    """When everything known is over; `at_s` when nothing is."""
    slot_s: float
    """When a newcomer's iteration can begin for the pipeline's sake: `at_s` while a slot is free."""
    feed_s: float
    """When a new batch's first microbatch can be at stage 0."""
    first_tokens_s: dict[str, float]
    """When each waiting prompt is through the last stage."""
    last_entry_s: float
    """When the last known iteration enters stage 0: a newcomer joins it before that. `at_s` when all have."""
    last_starts_s: list[float]
    """When that iteration, where it has to wait to enter, starts on each stage."""
    known: KnownWork

    @property
    def is_idle(self) -> bool:
        """Whether nothing at all is known."""
        return not any(self.ops) and not self.known.decode_gap_s

    def turn_of_iteration(self, stage: int, at_s: float, before_s: float) -> float:
        """When an iteration that comes at `at_s`, and began on the stage before at `before_s`, can run.

        It waits for the op in progress and for inference ahead of it.
        """
        ends_s = self.ends_s[stage]
        place = bisect_left(self.starts_s[stage], at_s) - 1
        turn_s = at_s
        if place >= 0 and ends_s[place] > at_s and not self._is_overtaken(stage, place, before_s):
            turn_s = ends_s[place]
        return max(turn_s, self.inference_ends_s[stage])

    def _is_overtaken(self, stage: int, place: int, before_s: float) -> bool:
        """Whether a training forward, ahead of the iteration on the stage before, is behind it here."""
        op = self.ops[stage][place]
        if op.kind != FORWARD or stage == 0 or not isinstance(op.flow, Batch):
            return False
        duration_s = op.flow.forward_s[op.microbatch][stage - 1]
        return self.starts_s[stage][place] - self.known.hop_s - duration_s >= before_s

    def first_idle(self, stage: int, at_s: float) -> float:
        """The first time from `at_s` on when the stage has nothing to do."""
        starts_s, ends_s = self.starts_s[stage], self.ends_s[stage]
        place = bisect_right(starts_s, at_s) - 1
        if place < 0 or ends_s[place] <= at_s:
            return at_s
        while place + 1 < len(starts_s) and starts_s[place + 1] <= ends_s[place]:
            place += 1
        return ends_s[place]
