"""Notices a node that owes a report and sends none. Pure."""

STALLED_AFTER_S = 120.0
"""A node with work and without a report for so long has lost a message: it starts again."""


class StallWatch:
    """Is asked at every tick, so that silence is measured from the first one that finds work."""

    def __init__(self) -> None:
        self._silent_since_s: float | None = None

    def restart(self) -> None:
        """Note that a stage has reported something, or that the node begins anew."""
        self._silent_since_s = None

    def is_stalled(self, now_s: float, *, has_work: bool) -> bool:
        """Whether batches are with the stages, and none of these has reported for too long."""
        if not has_work:
            self._silent_since_s = None
        elif self._silent_since_s is None:
            self._silent_since_s = now_s
        return self._silent_since_s is not None and now_s - self._silent_since_s > STALLED_AFTER_S
