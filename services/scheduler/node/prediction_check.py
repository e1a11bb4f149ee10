"""Whether stages do what was predicted: then the prediction still holds, and need not be made again. Pure."""

from services.scheduler.node.known_work import BACKWARD, FORWARD, ITERATION, STEP, Iteration, Op
from services.scheduler.node.prediction import Prediction
from shared.messages.events import OpKind, StageOp, StageProgress

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
            end_s = sent_s - ended.ago_s
            if not self._is_next(stage, ended.op, end_s, self._prediction.ends_s[stage]):
                return False
            self._num_done[stage] += 1
        running = progress.running
        if running is None:
            return self._may_rest(stage, sent_s)
        return self._is_next(stage, running.op, sent_s - running.ago_s, self._prediction.starts_s[stage])

    def _is_next(self, stage: int, told: StageOp, at_s: float, times_s: list[float]) -> bool:
        place = self._num_done[stage]
        if place >= len(times_s):
            return False
        op = self._prediction.ops[stage][place]
        return _is_same(op, told) and abs(times_s[place] - at_s) <= _tolerance_s(op)

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
    return max(TOLERANCE_S, TOLERANCE * op.duration_s)
