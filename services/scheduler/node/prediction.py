"""A node's predicted future, and questions about it: when could something new run there. Pure."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import chain, repeat
from operator import itemgetter
from typing import NamedTuple

from services.scheduler.node.known_work import FORWARD, Batch, Iteration, KnownWork, Op
from services.scheduler.node.slices_of_ops import cut_s


class Entry(NamedTuple):
    """When an iteration will enter stage 0: until then a newcomer's prompt can join it."""

    at_s: float
    iteration: Iteration
    starts_s: list[float]
    """By stage."""


class _Ops(NamedTuple):
    """Ops in the order of their starts, with these, their ends, and their stages."""

    ops: list[Op]
    starts_s: list[float]
    ends_s: list[float]
    stages: list[int]

    def at(self, at_s: float) -> int | None:
        """The place of the op that runs at that time, or begins then; None: none does."""
        place = bisect_right(self.starts_s, at_s) - 1
        return place if place >= 0 and self.ends_s[place] > at_s else None


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
    decode_entries: list[Entry]
    """The iterations of decodes alone that enter after it."""
    known: KnownWork
    _on_devices: dict[int, _Ops] = field(default_factory=dict, init=False)
    """By device, where stages share one and somebody has asked."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing at all is known."""
        return not any(self.ops) and not self.known.decode_gap_s

    def joinable(self, at_s: float, room: int) -> Entry | None:
        """The iteration that a prompt joins that comes then; None: none is known.

        It is the last one that waits, if it has at most `room` rows; else the next one of decodes alone.
        """
        if self.last_entry_s > at_s and self.known.formed[-1].work.num_tokens <= room:
            return Entry(self.last_entry_s, self.known.formed[-1], self.last_starts_s)
        place = bisect_left(self.decode_entries, at_s, key=itemgetter(0))
        return self.decode_entries[place] if place < len(self.decode_entries) else None

    def turn_of_iteration(self, stage: int, at_s: float, before_s: float) -> float:
        """When an iteration that comes at `at_s`, and began on the stage before at `before_s`, can run.

        It waits for the op in progress, or for the end of its slice, and for inference ahead of it.
        """
        wanted_s = max(at_s, self.inference_ends_s[stage])
        if (again_s := self._given_way_before(stage, at_s, before_s)) is not None:
            return max(wanted_s, again_s)
        on_device = self._on_device_of(stage)
        place = on_device.at(wanted_s)
        if place is None:
            return wanted_s
        op, start_s = on_device.ops[place], on_device.starts_s[place]
        would_begin = start_s == wanted_s and not op.done_s
        if would_begin or self._is_overtaken(stage, op, start_s, before_s):
            return wanted_s
        turn_s = (
            self.known.training_turn * on_device.ops[place - 1].duration_s if op.done_s and place else 0.0
        )
        return cut_s(self.known, on_device.stages[place], op, start_s, max(wanted_s, start_s + turn_s))

    def _given_way_before(self, stage: int, at_s: float, before_s: float) -> float | None:
        """When an op gives way again that did so on the stage before; None: that is not on the same device,
        or none did.
        """
        if stage == 0 or not self._is_near(stage):
            return None
        on_device = self._on_device_of(stage)
        place = on_device.at(before_s)
        if place is None or on_device.starts_s[place] == before_s:
            return None
        op, its_stage, given_way_s = on_device.ops[place], on_device.stages[place], at_s - before_s
        if self.known.num_slices_of(its_stage, op.kind) == 1:
            return None
        went_on_s = on_device.starts_s[place] + given_way_s
        return cut_s(self.known, its_stage, op, went_on_s, at_s + self.known.training_turn * given_way_s)

    def _is_near(self, stage: int) -> bool:
        """Whether a stage is on the device of the one before it."""
        devices = self.known.devices
        return bool(devices) and devices[stage] == devices[stage - 1]

    def _is_overtaken(self, stage: int, op: Op, start_s: float, before_s: float) -> bool:
        """Whether an op that would be in progress is behind the iteration: a training forward, ahead of it on
        the stage before; or whatever would begin while the iteration was on that stage of the same device.
        """
        if stage == 0:
            return False
        if self._is_near(stage):
            return start_s >= before_s
        if op.kind != FORWARD or not isinstance(op.flow, Batch):
            return False
        duration_s = op.flow.forward_s[op.microbatch][stage - 1]
        return start_s - self.known.hop_s - duration_s >= before_s

    def _on_device_of(self, stage: int) -> _Ops:
        """All ops of the stage's device, in the order of their starts."""
        devices = self.known.devices
        device = devices[stage] if devices else stage
        stages = [each for each, on in enumerate(devices) if on == device] if devices else [stage]
        if len(stages) == 1:
            ops = self.ops[stage]
            return _Ops(ops, self.starts_s[stage], self.ends_s[stage], [stage] * len(ops))
        if device not in self._on_devices:
            spans = sorted(
                chain.from_iterable(
                    zip(self.starts_s[each], self.ends_s[each], self.ops[each], repeat(each))
                    for each in stages
                ),
                key=itemgetter(0),
            )
            self._on_devices[device] = _Ops(
                [op for _, _, op, _ in spans],
                [start_s for start_s, _, _, _ in spans],
                [end_s for _, end_s, _, _ in spans],
                [each for _, _, _, each in spans],
            )
        return self._on_devices[device]

    def first_idle(self, stage: int, at_s: float) -> float:
        """The first time from `at_s` on when the stage's device has nothing to do."""
        _, starts_s, ends_s, _ = self._on_device_of(stage)
        place = bisect_right(starts_s, at_s) - 1
        if place < 0 or ends_s[place] <= at_s:
            return at_s
        while place + 1 < len(starts_s) and starts_s[place + 1] <= ends_s[place]:
            place += 1
        return ends_s[place]
