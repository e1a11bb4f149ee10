"""Hop and hand-over, from the progress of stages whose overheads are known."""

import pytest

from lemix.studies.overheads import OverheadProbe
from lemix.studies.runner import StudyFailedError
from shared.bus.base import Incoming
from shared.messages.events import OpEnded, OpKind, StageOp, StageProgress
from tests.support.simulation import ITERATION_S, ROW_S, SimpleTimes

HOP_S, HANDOVER_S = 0.0625, 0.03125


class SetClock:
    """Shows what it is set to."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def now_s(self) -> float:
        return self.at_s

    def wall_s(self) -> float:
        return self.at_s


class Stages:
    """Two stages of a node tell a probe of ops."""

    def __init__(self) -> None:
        self._clock = SetClock()
        self.probe = OverheadProbe((SimpleTimes(), SimpleTimes()), self._clock)

    async def did(
        self, stage: int, kind: OpKind, index: int, start_s: float, took_s: float, told_after_s: float = 0.25
    ) -> float:
        """An op of four rows; returns its end."""
        op = StageOp(
            kind=kind,
            task_ids=("t",),
            index=index,
            num_tokens=4,
            num_pairs=10,
            num_sequences=1,
            num_context_tokens=4,
        )
        self._clock.at_s = start_s + took_s + told_after_s
        ended = (OpEnded(op=op, elapsed_s=took_s, ago_s=told_after_s),)
        progress = StageProgress(node=0, stage=stage, ended=ended, running=None)
        await self.probe.on_progress(Incoming(progress, ""))
        return start_s + took_s


async def test_an_iteration_on_idle_stages_tells_both() -> None:
    stages, took_s = Stages(), ITERATION_S + 4 * ROW_S + HANDOVER_S
    end_s = await stages.did(0, "iteration", 1, 10.0, took_s)
    await stages.did(1, "iteration", 1, end_s + HOP_S, took_s, told_after_s=0.5)
    assert stages.probe.overheads() == pytest.approx((HOP_S, HANDOVER_S))


async def test_without_an_idle_stage_nothing_is_made_up() -> None:
    stages = Stages()
    await stages.did(0, "iteration", 1, 10.0, 1.0)
    with pytest.raises(StudyFailedError, match="no iteration has met idle stages"):
        stages.probe.overheads()


async def test_waiting_for_a_busy_stage_is_no_hop_and_an_op_handed_ahead_has_no_hand_over() -> None:
    stages, device_s = Stages(), ITERATION_S + 4 * ROW_S
    first_s = await stages.did(0, "iteration", 1, 10.0, device_s + HANDOVER_S)
    first_end_s = await stages.did(1, "iteration", 1, first_s + HOP_S, device_s + HANDOVER_S)
    second_s = await stages.did(0, "iteration", 2, first_s, device_s)
    assert second_s < first_end_s
    await stages.did(1, "iteration", 2, first_end_s, device_s)
    assert stages.probe.overheads() == pytest.approx((HOP_S, HANDOVER_S))


async def test_training_ops_tell_of_the_hand_over_and_the_last_stage_goes_backward_at_once() -> None:
    stages, forward_s, backward_s = Stages(), 8 * ROW_S, 16 * ROW_S
    await stages.did(0, "forward", 0, 10.0, forward_s + HANDOVER_S)
    await stages.did(1, "forward", 0, 20.0, forward_s + backward_s + HANDOVER_S)
    await stages.did(0, "backward", 0, 30.0, backward_s + HANDOVER_S)
    end_s = await stages.did(0, "iteration", 1, 40.0, ITERATION_S + 4 * ROW_S + HANDOVER_S)
    await stages.did(1, "iteration", 1, end_s + HOP_S, ITERATION_S + 4 * ROW_S + HANDOVER_S)
    assert stages.probe.overheads() == pytest.approx((HOP_S, HANDOVER_S))
