"""Which stages of a node are alive, from their heartbeats alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from shared.messages.cluster import Heartbeat
from shared.subjects import HEARTBEAT_S

LOST_AFTER_S = 3 * HEARTBEAT_S


@dataclass(frozen=True, slots=True)
class Seen:
    """The last that was heard of a stage."""

    instance: str
    ready: bool
    at_s: float


@dataclass(frozen=True, slots=True)
class Members:
    """The stages of one node."""

    num_stages: int
    seen: Mapping[int, Seen] = field(default_factory=dict)

    @property
    def are_complete(self) -> bool:
        """Every stage is there and ready."""
        return all(stage in self.seen and self.seen[stage].ready for stage in range(self.num_stages))

    def is_restart(self, beat: Heartbeat) -> bool:
        """Whether the stage was another process when it was last heard, or the node another pipeline."""
        known = self.seen.get(beat.stage)
        return beat.num_stages != self.num_stages or (known is not None and known.instance != beat.instance)

    def after(self, beat: Heartbeat, now_s: float) -> Self:
        others = self.seen if beat.num_stages == self.num_stages else {}
        seen = {**others, beat.stage: Seen(beat.instance, beat.ready, now_s)}
        return replace(self, num_stages=beat.num_stages, seen=seen)

    def lost(self, now_s: float) -> list[int]:
        """Stages whose heartbeats have stopped."""
        return sorted(stage for stage, seen in self.seen.items() if now_s - seen.at_s > LOST_AFTER_S)

    def without(self, stages: list[int]) -> Self:
        return replace(self, seen={stage: seen for stage, seen in self.seen.items() if stage not in stages})
