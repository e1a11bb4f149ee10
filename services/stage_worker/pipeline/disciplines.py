"""Chooses a stage's next work. A discipline is a pure function with a name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol


class WorkKind(IntEnum):
    """Kinds of work, in the order in which `slo_first` prefers them."""

    CONTROL = 0
    """Restoring or saving weights."""
    INFERENCE = 1
    STEP = 2
    BACKWARD = 3
    TRAINING_FORWARD = 4
    DEFERRABLE = 5
    """An iteration that can wait."""


class Waiting(Protocol):
    """The view that a discipline has of an item of work."""

    @property
    def kind(self) -> WorkKind: ...

    @property
    def since_s(self) -> float: ...


@dataclass(frozen=True, slots=True)
class SloFirst:
    """Inference overtakes training, backwards overtake training forwards, all overtake what is deferrable.

    After a backward a training forward goes first: where both wait, they take turns. Two backwards in a row
    would leave the next stages without work, and the pipeline would not come out of that by itself.
    Work that has waited `patience_s` behind inference goes first all the same: deferrable is not starved.
    """

    patience_s: float

    def __call__(self, items: Sequence[Waiting], now_s: float, after: WorkKind | None = None) -> int:
        return min(range(len(items)), key=lambda index: (self._urgency(items[index], now_s, after), index))

    def _urgency(self, item: Waiting, now_s: float, after: WorkKind | None) -> int:
        if item.kind > WorkKind.INFERENCE and now_s - item.since_s >= self.patience_s:
            return WorkKind.CONTROL
        return _TURNED.get(item.kind, item.kind) if after is WorkKind.BACKWARD else item.kind


_TURNED = {
    WorkKind.BACKWARD: WorkKind.TRAINING_FORWARD,
    WorkKind.TRAINING_FORWARD: WorkKind.BACKWARD,
}


def fifo(items: Sequence[Waiting], now_s: float, after: WorkKind | None = None) -> int:
    """First come, first served, as in the paper."""
    return 0


def next_iteration(items: Sequence[Waiting]) -> int | None:
    """The index of the iteration that has waited longest, for which a pass gives way; None: none waits."""
    return next((index for index, item in enumerate(items) if item.kind is WorkKind.INFERENCE), None)


Discipline = Callable[[Sequence[Waiting], float, WorkKind | None], int]
"""(items in order of arrival, at least one; now; kind of the last microbatch's pass) -> index of the next."""

DISCIPLINES: Mapping[str, Callable[[float], Discipline]] = {
    "fifo": lambda patience_s: fifo,
    "slo_first": SloFirst,
}
