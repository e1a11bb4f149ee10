"""The overheads of services over their devices' times, from the reports of a working cluster's stages.

The simulation has both as options, so that it need not guess them, and nothing is fitted to its result.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from lemix.studies.runner import StudyFailedError
from shared.bus.base import Incoming
from shared.clock import Clock
from shared.messages.events import OpEnded, StageOp, StageProgress
from shared.profiles.times import StageTimes

IDLE_S = 0.001
"""A stage that had so long nothing to do had no op handed to its device ahead."""

Device = tuple[int, int]
"""(node, stage)"""


class Overheads(NamedTuple):
    """Means over a run, in seconds."""

    hop_s: float
    """Seconds from the end of an iteration on one stage to its start on the next, idle one.

    This is a message, and the work of the services before and after it.
    """
    handover_s: float
    """Seconds from the moment when a device is done until its service knows."""


class OverheadProbe:
    """Listens to the stages' progress."""

    def __init__(self, times: Sequence[StageTimes], clock: Clock) -> None:
        """`times`: of the devices, by stage."""
        self._times = times
        self._clock = clock
        self._free_s: dict[Device, float] = {}
        """When the last op of each device ended."""
        self._passed_s: dict[tuple[int, StageOp], float] = {}
        """When each op ended on the stage before, by (next stage's number in the cluster, op)."""
        self._hops_s: list[float] = []
        self._handovers_s: list[float] = []

    async def on_progress(self, incoming: Incoming[StageProgress]) -> None:
        """A stage tells what it has done."""
        progress, now_s = incoming.message, self._clock.now_s()
        for ended in progress.ended:
            self._note((progress.node, progress.stage), ended, now_s - ended.ago_s)

    def overheads(self) -> Overheads:
        """The overheads of the run so far.

        Raises StudyFailedError when no stage was ever idle before an op."""
        if not self._hops_s or not self._handovers_s:
            raise StudyFailedError("hop and hand-over are unknown: no iteration has met idle stages")
        return Overheads(statistics.fmean(self._hops_s), statistics.fmean(self._handovers_s))

    def _note(self, device: Device, ended: OpEnded, end_s: float) -> None:
        start_s, free_s = end_s - ended.elapsed_s, self._free_s.get(device, 0.0)
        if start_s - free_s > IDLE_S:
            self._handovers_s.append(ended.elapsed_s - self._device_s(device, ended.op))
        sent_s = self._passed_s.pop((self._number(device), ended.op), None)
        if sent_s is not None and free_s <= sent_s:
            self._hops_s.append(start_s - sent_s)
        self._free_s[device] = end_s
        if ended.op.kind == "iteration" and not self._is_last(device):
            self._passed_s[self._number(device) + 1, ended.op] = end_s

    def _number(self, device: Device) -> int:
        node, stage = device
        return node * len(self._times) + stage

    def _is_last(self, device: Device) -> bool:
        return device[1] == len(self._times) - 1

    def _device_s(self, device: Device, op: StageOp) -> float:
        """How long the device takes; no batch of the study is offloaded."""
        times, work = self._times[device[1]], op.work
        match op.kind:
            case "iteration":
                return times.iteration_s(work)
            case "forward":
                return times.forward_s(work) + (times.backward_s(work) if self._is_last(device) else 0.0)
            case "backward":
                return times.backward_s(work)
            case "step":
                return times.step_s()
