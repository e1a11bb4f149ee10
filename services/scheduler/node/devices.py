"""The devices of a node in a prediction: what waits for each, runs on it, and stands aside. Pure.

A little discrete-event simulation: ops arrive at stages, begin when their device takes them, and end. What
follows from an end is for others to say (`coming_iterations`, `coming_batches`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from services.scheduler.node.known_work import (
    BACKWARD,
    FORWARD,
    ITERATION,
    Iteration,
    KnownWork,
    Op,
    Running,
)
from services.scheduler.node.slices_of_ops import RunningInSlices, cut_s, next_on_device

SLACK_S = 1e-9
_END, _CUT, _WAKE = 8, 9, 10
"""At one instant arrivals come first, then ends: whoever is there may be chosen."""


@dataclass(slots=True)
class Device:
    """One device, and the ops of its stages that are there."""

    first_stage: int
    after_backward: bool
    """Whether the last microbatch went backward: then a forward goes first."""
    training_from_s: float
    """No training op begins before."""
    queue: list[tuple[int, float, int, int, Op]] = field(default_factory=list)
    """A heap: (rank, since when it waits, tie, stage, op), of all but training forwards."""
    forwards: list[tuple[float, int, int, Op]] = field(default_factory=list)
    """A heap: (since when it waits, tie, stage, op), of training forwards only."""
    num_running: int = 0
    """Several only where nobody has told yet that the earlier ones are over."""
    sliced: RunningInSlices | None = None
    """The op that runs, if it gives way."""
    aside: tuple[int, Op] | None = None
    """(stage, the rest of its op that stands aside)."""


class Devices:
    """All devices of a node, from the ops that run now to the last one."""

    def __init__(self, known: KnownWork, now_s: float) -> None:
        stages = range(known.num_stages)
        self.from_s = [min(told_s, now_s) for told_s in known.told_s] or [now_s for _ in stages]
        """By stage: nothing begins or ends there before."""
        self.ops: list[list[Op]] = [[] for _ in stages]
        """By stage, in the order of their starts; so are these and the ends."""
        self.starts_s: list[list[float]] = [[] for _ in stages]
        self.ends_s: list[list[float]] = [[] for _ in stages]
        self._known = known
        after_backward = known.after_backward or [False for _ in stages]
        self._devices = [Device(stage, after_backward[stage], self.from_s[stage]) for stage in stages]
        """By their first stage; the other places are empty devices."""
        self._device_of = [self._devices[device] for device in known.devices] or self._devices
        """By stage."""
        self._events: list[tuple[float, int, int, int, Op | None, float]] = []
        """(time, rank, tie, stage, op, since when it waits)."""
        self._tie = 0
        self._void_ends: set[int] = set()
        """Ties of the ends of ops that stood aside before."""
        self._gaps_s = () if known.num_decode_iterations else known.decode_gap_s
        """By device: what decodes take after a training op; empty: nothing."""
        self._starts_s_of: dict[int, list[float]] = {}
        """By id of an iteration."""
        self._begin_running()

    def arrive(self, at_s: float, stage: int, op: Op) -> None:
        """Let an op come to a stage: one that waits for long already is noticed when something may begin."""
        self._tie += 1
        noticed_s = max(at_s, self.from_s[stage])
        heappush(self._events, (noticed_s, op.kind, self._tie, stage, op, at_s))

    def starts_of(self, iteration: Iteration) -> list[float]:
        """The starts of an iteration that has begun nowhere yet, by stage: they come into this list."""
        starts_s = self._starts_s_of[id(iteration)] = []
        return starts_s

    def let_decodes_between(self) -> None:
        """From now on decodes are no ops, and take their time between those of training."""
        self._gaps_s = self._known.decode_gap_s

    def ends(self) -> Iterator[tuple[Op, int, float]]:
        """Let time go by: (op, stage, time) of each end. What follows from it arrives before the next."""
        events, device_of, void_ends = self._events, self._device_of, self._void_ends
        while events:
            at_s, rank, tie, stage, op, since_s = heappop(events)
            device = device_of[stage]
            if rank < _END:
                assert op is not None
                if rank == FORWARD:
                    heappush(device.forwards, (since_s, tie, stage, op))
                else:
                    heappush(device.queue, (rank, since_s, tie, stage, op))
                if rank == BACKWARD and device.after_backward:  # a forward of this moment goes first
                    self._wake(at_s, stage)
                    continue
                if rank == ITERATION:
                    self._plan_cut(device, at_s)
            elif rank == _CUT:
                self._stand_aside(device, at_s)
            elif tie in void_ends:
                continue
            elif op is not None:
                self._end(device, op, at_s)
                yield op, stage, at_s
                if stage == 0:  # what follows comes in this very moment, and may go first
                    self._wake(at_s, stage)
                    continue
            if not device.num_running:
                self._start_next(device, at_s)

    # The present

    def _begin_running(self) -> None:
        known, from_s = self._known, self.from_s
        for stage, running in enumerate(known.running):
            if running is None:
                continue
            after = next_on_device(known, stage)
            end_s = running.start_s + running.op.duration_s
            if after is not None and after.start_s < end_s:
                if after.op.kind == ITERATION and known.num_slices_of(stage, running.op.kind) > 1:
                    self._stood_aside(stage, running, after.start_s)
                    continue
                end_s = after.start_s
            self._record(stage, running.op, running.start_s, max(from_s[stage], end_s), running.turn_until_s)
        for stage, rest in enumerate(known.aside):
            if rest is not None:
                self._device_of[stage].aside = (stage, rest)
        for device, at_s in zip(self._devices, from_s, strict=True):
            self._go_on(device, at_s, 0.0)

    def _stood_aside(self, stage: int, running: Running, at_s: float) -> None:
        """Note that an op stands aside since another stage's iteration has begun on its device."""
        done_s = at_s - running.start_s
        rest_s = running.op.duration_s - done_s
        self.ops[stage].append(running.op._replace(duration_s=done_s, rest_s=rest_s))
        self.starts_s[stage].append(running.start_s)
        self.ends_s[stage].append(at_s)
        rest = running.op._replace(duration_s=rest_s, done_s=running.op.done_s + done_s)
        self._device_of[stage].aside = (stage, rest)

    # The future

    def _wake(self, at_s: float, stage: int) -> None:
        self._tie += 1
        heappush(self._events, (at_s, _WAKE, self._tie, stage, None, at_s))

    def _start_next(self, device: Device, at_s: float) -> None:
        queue, forwards = device.queue, device.forwards
        if not queue and not forwards:
            return
        kind = queue[0][0] if queue else FORWARD
        if kind == BACKWARD and forwards and device.after_backward:
            kind = FORWARD
        if kind != ITERATION and at_s < device.training_from_s:
            self._wake(device.training_from_s, device.first_stage)
            return
        stage, op = heappop(forwards)[2:] if kind == FORWARD else heappop(queue)[3:]
        if kind != ITERATION and self._gaps_s:
            op = op._replace(duration_s=op.duration_s + self._decodes_within_s(device, op, at_s))
        self._record(stage, op, at_s, at_s + op.duration_s)

    def _decodes_within_s(self, device: Device, op: Op, at_s: float) -> float:
        """Seconds that decoding takes of the device between the turns of an op that begins now."""
        known, place = self._known, device.first_stage
        num_slices = known.num_slices_of(place, op.kind)
        if at_s >= known.decode_until_s or num_slices == 1:
            return 0.0
        turn_s = max(op.duration_s / num_slices, known.training_turn * known.decode_s[place])
        return self._gaps_s[place] * (op.duration_s // turn_s)

    def _record(self, stage: int, op: Op, start_s: float, end_s: float, turn_until_s: float = 0.0) -> None:
        """Let an op run on its device, and note it."""
        self.ops[stage].append(op)
        self.starts_s[stage].append(start_s)
        self.ends_s[stage].append(end_s)
        if (starts_s := self._starts_s_of.get(id(op.flow))) is not None:
            starts_s.append(start_s)
        device = self._device_of[stage]
        device.num_running += 1
        if op.kind in (FORWARD, BACKWARD):
            device.after_backward = op.kind == BACKWARD
        self._tie += 1
        heappush(self._events, (end_s, _END, self._tie, stage, op, end_s))
        if self._known.num_slices_of(stage, op.kind) > 1:
            device.sliced = RunningInSlices(stage, op, start_s, end_s, self._tie, turn_until_s)

    def _end(self, device: Device, op: Op, at_s: float) -> None:
        device.num_running -= 1
        device.sliced = None
        if device.aside is not None:
            self._go_on(device, at_s, op.duration_s)
        gaps_s = self._gaps_s
        if gaps_s and op.kind != ITERATION and op.flow is not None and at_s < self._known.decode_until_s:
            device.training_from_s = at_s + gaps_s[device.first_stage]

    # Giving way

    def _plan_cut(self, device: Device, at_s: float) -> None:
        """An iteration waits: have the op that runs stand aside at the end of a slice."""
        sliced = device.sliced
        if sliced is None or sliced.is_cut or device.num_running > 1:
            return
        wanted_s = max(at_s, sliced.turn_until_s)
        aside_s = max(at_s, cut_s(self._known, sliced.stage, sliced.op, sliced.start_s, wanted_s))
        if aside_s < sliced.end_s - SLACK_S:
            sliced.is_cut = True
            self._tie += 1
            heappush(self._events, (aside_s, _CUT, self._tie, sliced.stage, None, at_s))

    def _stand_aside(self, device: Device, at_s: float) -> None:
        sliced = device.sliced
        assert sliced is not None, "nothing else ends it"
        stage, op, done_s = sliced.stage, sliced.op, at_s - sliced.start_s
        rest_s = op.duration_s - done_s
        self._void_ends.add(sliced.tie)
        self.ops[stage][-1] = op._replace(duration_s=done_s, rest_s=rest_s)
        self.ends_s[stage][-1] = at_s
        device.aside = (stage, op._replace(duration_s=rest_s, done_s=op.done_s + done_s))
        device.sliced = None
        device.num_running -= 1

    def _go_on(self, device: Device, at_s: float, given_way_s: float) -> None:
        """Let the op go on that stands aside, if there is one and nothing runs."""
        if device.aside is None or device.num_running:
            return
        stage, op = device.aside
        device.aside = None
        self._record(stage, op, at_s, at_s + op.duration_s, at_s + self._known.training_turn * given_way_s)
        if device.queue and device.queue[0][0] == ITERATION:
            self._plan_cut(device, at_s)
