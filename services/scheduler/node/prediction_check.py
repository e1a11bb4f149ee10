"""Whether stages do what was predicted: then the prediction still holds, and need not be made again. Pure."""

from services.scheduler.node.known_work import BACKWARD, FORWARD, ITERATION, STEP, Iteration, Op
from services.scheduler.node.prediction import Prediction
from shared.messages.events import OpKind, OpStarted, StageOp, StageProgress

TOLERANCE_S = 0.0005
TOLERANCE = 0.02
"""An op may begin and end so much earlier or later than predicted; or by this share of its duration."""
KINDS: dict[OpKind, int] = {"iteration": ITERATION, "step": STEP, "backward": BACKWARD, "forward": FORWARD}


class PredictionCheck:
    """How far each stage has come in a prediction."""

    def __init__(self, prediction: Prediction) -> None:
        self._prediction = prediction
        self._num_done = [0] * len(prediction.ops)
        """By stage: predicted ops that have ended."""

    def holds(self, progress: StageProgress, sent_s: float) -> bool:
        """Take in a stage's report; False when it differs from the prediction, in ops or in times.

        Times are compared with the predicted ones themselves, so that small deviations do not add up.
        """
        stage = progress.stage
        for ended in progress.ended:
            self._pass_by(stage, sent_s)
            if not self._ends(stage, ended.op, sent_s - ended.ago_s):
                return False
            self._num_done[stage] += 1
        self._pass_by(stage, sent_s)
        if progress.running is not None:
            return self._runs(stage, progress.running, sent_s)
        return progress.aside is not None or self._may_rest(stage, sent_s)

    def _pass_by(self, stage: int, sent_s: float) -> None:
        """Go on to what comes after an op that stands aside by then: that is not told of as an end."""
        ops, ends_s = self._prediction.ops[stage], self._prediction.ends_s[stage]
        place = self._num_done[stage]
        if place < len(ops) and ops[place].rest_s and ends_s[place] <= sent_s + TOLERANCE_S:
            self._num_done[stage] += 1

    def _ends(self, stage: int, told: StageOp, end_s: float) -> bool:
        place, ends_s = self._num_done[stage], self._prediction.ends_s[stage]
        return place < len(ends_s) and self._agree(stage, told, ends_s[place], end_s)

    def _runs(self, stage: int, told: OpStarted, sent_s: float) -> bool:
        """Starts are compared as if the op had run without a break."""
        place, starts_s = self._num_done[stage], self._prediction.starts_s[stage]
        if place >= len(starts_s):
            return False
        start_s = starts_s[place] - self._prediction.ops[stage][place].done_s
        return self._agree(stage, told.op, start_s, sent_s - told.ago_s + told.given_way_s)

    def _agree(self, stage: int, told: StageOp, foreseen_s: float, at_s: float) -> bool:
        op = self._prediction.ops[stage][self._num_done[stage]]
        return _is_same(op, told) and abs(foreseen_s - at_s) <= _tolerance_s(op)

    def _may_rest(self, stage: int, sent_s: float) -> bool:
        place, starts_s = self._num_done[stage], self._prediction.starts_s[stage]
        if place >= len(starts_s):
            return True
        return starts_s[place] >= sent_s - _tolerance_s(self._prediction.ops[stage][place])


def _is_same(op: Op, told: StageOp) -> bool:
    if KINDS[told.kind] != op.kind or op.flow is None:
        return False
    if isinstance(op.flow, Iteration):
        return op.flow.completes == told.task_ids and op.flow.work.num_tokens == told.num_tokens
    return op.flow.batch_id == told.task_ids[0] and op.microbatch == told.index


def _tolerance_s(op: Op) -> float:
    return max(TOLERANCE_S, TOLERANCE * (op.done_s + op.duration_s + op.rest_s))
