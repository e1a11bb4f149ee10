"""One attempt at a checkpoint: which stages have agreed, and which have written their share."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from shared.messages.training import ShardSaved


@dataclass(frozen=True, slots=True)
class Save:
    """A checkpoint of one node on its way. It ends when each stage has written, failed or refused."""

    version: int
    num_stages: int
    requested_s: float
    answered: bool = False
    """Every stage was asked and has agreed or refused: the steps beyond `version` may come."""
    shards: Mapping[int, ShardSaved] = field(default_factory=dict)
    """The shards that stages have written, by stage."""
    failures: Mapping[int, str] = field(default_factory=dict)
    """Why stages have not, by stage."""
    writing: bool = False
    """All shards are there; the manifest is being written."""

    @property
    def is_settled(self) -> bool:
        return self.answered and len({*self.shards, *self.failures}) == self.num_stages

    @property
    def num_bytes(self) -> int:
        """Bytes that the stages have written."""
        return sum(shard.written_bytes for shard in self.shards.values())

    @property
    def failure(self) -> str:
        """Why there will be no checkpoint; empty when nothing went wrong yet."""
        return "; ".join(f"stage {stage}: {reason}" for stage, reason in sorted(self.failures.items()))

    def with_answers(self, refusals: Mapping[int, str]) -> Self:
        return replace(self, answered=True, failures={**self.failures, **refusals})

    def with_shard(self, stage: int, shard: ShardSaved) -> Self:
        return replace(self, shards={**self.shards, stage: shard})

    def with_failure(self, stage: int, reason: str) -> Self:
        return replace(self, failures={**self.failures, stage: reason})
