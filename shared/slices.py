"""Where training gives way to inference within an op. Stages do it, the scheduler foresees it. Pure.

Each pass of a microbatch, forward or backward, is cut into slices of consecutive layers, and so is a step
that leaves the weights that serve alone until its end. Between two slices an iteration that waits goes first,
and the op goes on after it.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

MAX_SLICES = 8
"""More slices of a pass would make waits shorter, but each costs the launches around the layers again."""
TRAINING_TURN = 2.0
"""How long an op then goes on at least, in lengths of the iteration that it gave way to. Where neither
training nor decoding ever pauses, an iteration ends every three of its own lengths, to which a time between
tokens may grow (docs/benchmarks), and training has two thirds of the device."""
_ROUNDING = 1e-6
"""Share of a slice: an iteration that comes so shortly after its end still goes first."""


class NumSlices(NamedTuple):
    """Into how many slices a stage cuts its training ops; 1: they go on to their end."""

    of_pass: int = 1
    of_step: int = 1


WHOLE = NumSlices()


def num_slices(num_layers: int) -> int:
    """Slices of one pass through so many layers."""
    return min(num_layers, MAX_SLICES)


def next_cut_s(passes_s: Sequence[float], count: int, from_s: float) -> float:
    """The first end of a slice from `from_s` on, in seconds of an op that consists of these passes.

    `count`: slices of each pass. The op's own end where nothing else comes before.
    """
    begin_s = 0.0
    for pass_s in passes_s:
        slice_s = pass_s / count
        if from_s < begin_s + pass_s:
            return begin_s + slice_s * ceil((from_s - begin_s) / slice_s - _ROUNDING)
        begin_s += pass_s
    return begin_s
