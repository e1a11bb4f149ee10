"""When which version of a node is evaluated: one after the other, and at rest what failed. Pure."""

from math import inf

REST_S = 60.0
"""Between two attempts to evaluate a version at rest."""


class EvaluationTurns:
    """Knows of versions and time alone, not of losses."""

    def __init__(self, every: int) -> None:
        """`every`: steps from one version that is evaluated to the next."""
        self.evaluating: int | None = None
        """The version that is evaluated now, or as soon as its step is done."""
        self.next_due = 0
        """The version to evaluate next, or the first one after it that can be."""
        self.newest_judged = 0
        """The newest version that was evaluated."""
        self.newest_tried = 0
        """The newest version that was evaluated, or is."""
        self._every = every
        self._has_failed = False
        """Something went wrong at rest, and was not tried again yet."""
        self._rests_until_s = -inf
        """When it may be."""

    def restart(self, version: int, *, newest_tried: int) -> None:
        """The node has begun anew, with that version."""
        self.next_due = version + self._every
        self.newest_judged = self.newest_tried = newest_tried
        self._has_failed, self._rests_until_s = False, -inf

    def is_due(self, version: int) -> bool:
        return self.evaluating is None and version >= self.next_due

    def may_begin_at_rest(self, now_s: float) -> bool:
        """Whether a version may be evaluated although none is due. After a failure REST_S must pass."""
        if self._has_failed:
            self._has_failed, self._rests_until_s = False, now_s + REST_S
        return self.evaluating is None and now_s >= self._rests_until_s

    def begin(self, version: int) -> None:
        """That version is the next one to be evaluated."""
        self.evaluating = self.newest_tried = version
        self.pass_over(version)

    def pass_over(self, version: int) -> None:
        """Another version takes the turn of this one."""
        self.next_due = version + self._every

    def judged(self, version: int) -> None:
        """That version was evaluated."""
        self.newest_judged = max(self.newest_judged, version)

    def postpone(self, version: int) -> None:
        """That version cannot be judged yet: its turn comes again."""
        self.next_due = version
        self.newest_tried = min(self.newest_tried, version - 1)

    def give_up(self, version: int) -> None:
        """The evaluation of that version came to nothing; it may be tried again at rest."""
        self.evaluating, self._has_failed = None, True
        self.newest_tried = min(self.newest_tried, max(version - 1, self.newest_judged))

    def revoke_from(self, version: int) -> None:
        """Neither the step to that version nor a later one is made."""
        if self.evaluating is not None and self.evaluating >= version:
            self.next_due, self.evaluating = self.evaluating, None
        self.newest_tried = min(self.newest_tried, version - 1)
