"""Ops of the compute thread that pause between slices, so that their executor may give way there.

Such an op is a generator: each `next` computes a slice, and its value comes with the last one. While it
pauses the stage is as others expect it: the newest weights are in place.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")

Slices: TypeAlias = Generator[None, None, T]


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """The value of an op that has come to its end."""

    value: T


def advance(op: Slices[T]) -> Done[T] | None:
    """Compute the next slice; None: there are more."""
    try:
        next(op)
    except StopIteration as end:
        return Done(end.value)
    return None


def finish(op: Slices[T]) -> T:
    """Compute all slices that are left."""
    while (done := advance(op)) is None:
        pass
    return done.value
