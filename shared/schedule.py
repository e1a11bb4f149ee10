"""The names of training's pipeline schedules: what trainer, scheduler and command line agree on."""

from typing import Literal

ScheduleName = Literal["async", "1f1b", "gpipe", "dp"]
"""`async`: A-PP, no flush between batches. `1f1b`, `gpipe`: S-PP, a batch enters when the one before it is
in the weights. `dp`: nodes of one stage, whose gradients are averaged over the nodes at each step.
"""


def is_synchronous(schedule: ScheduleName) -> bool:
    """Whether a batch enters only when the one before it is in the weights."""
    return schedule != "async"
