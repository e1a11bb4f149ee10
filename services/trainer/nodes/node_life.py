"""A node's life: whether it is closed, being restored or open, and when it may be restored. Pure.

closed --all stages ready--> restoring --all hold the checkpoint--> open
  ^  ^                           |                                   |
  |  '--- a stage restarts, falls silent or fails: its batches are given back ----'
  '--- after a rollback, during which the node stays closed
"""

from collections.abc import Iterator
from typing import Literal

from services.trainer.nodes.decisions import Closed
from services.trainer.nodes.members import Members
from shared.messages.cluster import Heartbeat


class NodeLife:
    """The phase, and what must be over before the next one."""

    def __init__(self, num_stages: int, *, fences: Iterator[int], joins_others: bool) -> None:
        """`joins_others`: the node shares its weights, and must be allowed to take those that others have."""
        self.phase: Literal["closed", "restoring", "open"] = "closed"
        self.fence = 0
        """A new one with every restore: what belongs to an earlier life of the node is known by it."""
        self.members = Members(num_stages)
        self.closing: Closed | None = None
        """Set while the node must close and a manifest is still being written."""
        self.rollback_to: int | None = None
        """Set from the order to roll back until it is done."""
        self._fences = fences
        self._has_spoken = False
        """Since it closed: a restore that fails is tried again at the next heartbeat, and not before."""
        self._joins_others = joins_others
        self._is_allowed = not joins_others
        """Whether this is the time to restore."""

    @property
    def is_closing(self) -> bool:
        """Whether it is not yet known what this node has made durable."""
        return self.closing is not None

    @property
    def is_rolling_back(self) -> bool:
        return self.rollback_to is not None

    @property
    def waits_to_join(self) -> bool:
        """All stages are there, and wait for the weights to hold."""
        return self._is_complete and self._has_spoken

    @property
    def can_restore(self) -> bool:
        return self._is_complete and self._is_allowed

    def heard(self, beat: Heartbeat, now_s: float) -> None:
        """Note that a stage is alive."""
        self.members = self.members.after(beat, now_s)
        self._has_spoken = True

    def allow_restore(self) -> None:
        """Let the closed node take the weights that the others have, once."""
        self._is_allowed = True

    def begin_restore(self) -> None:
        """Begin the next life."""
        self.phase, self._is_allowed = "restoring", not self._joins_others
        self.fence = next(self._fences)

    def close(self) -> None:
        self.phase, self._has_spoken = "closed", False

    @property
    def _is_complete(self) -> bool:
        """Whether the node is closed with all its stages, and nothing of its last life is unfinished."""
        is_busy = self.is_closing or self.is_rolling_back
        return self.phase == "closed" and not is_busy and self.members.are_complete
