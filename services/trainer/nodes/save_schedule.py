"""When a node saves: every few batches, when it rests, and never more bytes an hour than allowed. Pure."""

from math import inf

from services.trainer.nodes.save import Save


class SaveSchedule:
    """Knows the last checkpoint that was written, and the last that failed."""

    def __init__(self, *, every: int | None, idle_s: float, bytes_per_s: float = inf) -> None:
        """`every`: applied batches between two checkpoints; None: only when told. `idle_s`: without work for
        so long there is one, too. Neither comes before the last one's bytes are `bytes_per_s` in the mean.
        """
        self._every = every
        self._idle_s = idle_s
        self._bytes_per_s = bytes_per_s
        self._within_bound_from_s = -inf
        self._from_version = 0
        """After a failed checkpoint, the next occasion."""
        self._retry_from_s = -inf
        """After a failed checkpoint: when it may be told to try again."""
        self._idle_since_s: float | None = None

    def is_within_bound(self, now_s: float) -> bool:
        """Whether another checkpoint would not write too many bytes a second."""
        return now_s >= self._within_bound_from_s

    def may_retry(self, now_s: float) -> bool:
        """Whether `idle_s` have passed since the last one that failed was requested."""
        return now_s >= self._retry_from_s

    def is_due(self, version: int, durable_version: int, now_s: float, *, is_wanted: bool) -> bool:
        """A step to that version is ordered; `is_wanted`: save it now, unless saves wait to be told."""
        is_due = self._every is not None and (is_wanted or version - durable_version >= self._every)
        return is_due and version >= self._from_version and self.is_within_bound(now_s)

    def has_rested(self, now_s: float, *, is_idle: bool) -> bool:
        """Whether a node has no work and something to save for `idle_s`. True once, then it waits anew."""
        if self._every is None or not is_idle:
            self._idle_since_s = None
        elif self._idle_since_s is None:
            self._idle_since_s = now_s
        elif now_s >= self._idle_since_s + self._idle_s and self.is_within_bound(now_s):
            self._idle_since_s = None
            return True
        return False

    def written(self, save: Save) -> None:
        """Note a durable checkpoint."""
        self._within_bound_from_s = save.requested_s + save.num_bytes / self._bytes_per_s

    def abandoned(self, save: Save) -> None:
        """Note a checkpoint that will never be."""
        self._retry_from_s, self._from_version = save.requested_s + self._idle_s, save.version + 1

    def restart(self) -> None:
        """The node begins anew."""
        self._from_version, self._idle_since_s = 0, None
