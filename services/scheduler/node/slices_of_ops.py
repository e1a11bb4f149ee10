"""When a running op gives way to an iteration, as its stage will (`shared.slices`). Pure."""

from dataclasses import dataclass

from services.scheduler.node.known_work import (
    BACKWARD_SHARE,
    FORWARD,
    KnownWork,
    Op,
    Running,
)
from shared.slices import next_cut_s

_BEGUN = 1e-5
"""Share of an op: more than the rounding of `next_cut_s`, and less than a slice."""


@dataclass(slots=True)
class RunningInSlices:
    """An op that runs on a device, and stands aside for iterations."""

    stage: int
    op: Op
    start_s: float
    end_s: float
    tie: int
    """The one of the event of its end."""
    turn_until_s: float
    """It goes on at least until then."""
    is_cut: bool = False
    """Whether an event will have it stand aside."""


def cut_s(known: KnownWork, stage: int, op: Op, start_s: float, wanted_s: float) -> float:
    """When the op, which runs since `start_s`, gives way to what comes at `wanted_s`: its end at the latest.

    Not where it began to run: an op gets a slice done before it stands aside again.
    """
    end_s = start_s + op.duration_s
    count = known.num_slices_of(stage, op.kind)
    if count == 1 or wanted_s >= end_s:
        return end_s
    whole_s = op.done_s + op.duration_s
    is_both = op.kind == FORWARD and stage == known.num_stages - 1
    passes_s = ((1 - BACKWARD_SHARE) * whole_s, BACKWARD_SHARE * whole_s) if is_both else (whole_s,)
    from_s = op.done_s + max(wanted_s - start_s, whole_s * _BEGUN)
    return start_s + next_cut_s(passes_s, count, from_s) - op.done_s


def next_on_device(known: KnownWork, stage: int) -> Running | None:
    """Another stage's op that began later on the device of a stage that runs one.

    That one is over then, or stands aside. None: there is no such op.
    """
    running = known.running[stage]
    if running is None or not known.devices:
        return None
    later = [
        other
        for at, other in enumerate(known.running)
        if other is not None and at != stage and known.devices[at] == known.devices[stage]
        if other.start_s > running.start_s
    ]
    return min(later, key=lambda other: other.start_s, default=None)
