"""Predictions where what is known is at odds with what was foreseen."""

import pytest

from services.scheduler.node.known_work import FORWARD, Iteration, KnownWork, Op, Running, batch_of
from services.scheduler.node.list_schedule import predict
from shared.profiles.times import work_of_rows
from shared.slices import NumSlices
from tests.support.policies import LinearCosts

WORK = work_of_rows(0, 100)


@pytest.mark.parametrize("late_s", [0.0, 0.05, 2.0])
def test_an_op_that_runs_longer_than_foreseen_ends_now_and_does_not_stand_aside(late_s: float) -> None:
    """It was to take 0.3 s; an iteration waits for it."""
    costs = LinearCosts(1)
    batch = batch_of("b", [WORK], costs, 1, ready_s=0.0)
    op = Op(FORWARD, batch, 0, batch.forward_s[0][0])
    known = KnownWork(
        num_stages=1,
        hop_s=0.0,
        running=[Running(op, -op.duration_s - late_s)],
        num_slices=[NumSlices(8, 8)],
        told_s=[0.0],
        batches=[batch],
        formed=[Iteration(WORK, [costs.iteration_s(0, WORK)], ("r",), ready_s=-0.01)],
    )
    prediction = predict(known, 0.0)
    assert prediction.first_tokens_s["r"] == pytest.approx(0.1, abs=0.02)
    assert [each.kind for each in prediction.ops[0]].count(FORWARD) == 1
