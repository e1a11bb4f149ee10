"""Limits by the minute: a bucket that fills evenly, as a function of its state and of time."""

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """The rest of a limit; below zero when more was used than there was."""

    per_minute: int
    """Also what it holds at most."""
    left: float
    at_s: float
    """When that much was left (monotonic seconds)."""

    @classmethod
    def full(cls, per_minute: int, now_s: float) -> Self:
        """A full bucket."""
        return cls(per_minute=per_minute, left=per_minute, at_s=now_s)

    def at(self, now_s: float) -> Self:
        """The same bucket at a later time."""
        gained = (now_s - self.at_s) * self.per_minute / 60
        return replace(self, left=min(self.per_minute, self.left + gained), at_s=now_s)

    def without(self, amount: float) -> Self:
        """The bucket after `amount` was taken."""
        return replace(self, left=self.left - amount)

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` is there; the whole bucket is enough for any amount."""
        missing = min(amount, self.per_minute) - self.left
        return max(0.0, missing * 60 / self.per_minute)

    @property
    def reset_s(self) -> float:
        """Seconds until it is full again."""
        return self.wait_s(self.per_minute)
