"""Which training batches are where: what each node's weights contain, and what is durably done.

A batch is accepted from the stream (pending), applied on one node, and made durable by that node's
next checkpoint; until then a crash takes it off the node again, and it is still pending. A stream
sequence is done when a durable checkpoint of some node contains its batch, or when it was skipped
(refused, or a duplicate). Reading goes on after the watermark: every sequence up to it is done.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

MAX_RECENT_IDS = 100_000
"""Batch ids that a checkpoint names, so that a repeated publication is recognised."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """What one node's weights contain."""

    durable_version: int = 0
    """Optimizer steps in the newest durable checkpoint."""
    sequences: frozenset[int] = frozenset()
    """Sequences above the watermark in that checkpoint."""
    recent_ids: Mapping[str, None] = field(default_factory=dict)
    """Ids in that checkpoint, oldest first: a set that keeps its order."""
    applied: tuple[str, ...] = ()
    """Batches applied since then, in order."""

    @property
    def version(self) -> int:
        """Optimizer steps that the weights contain now."""
        return self.durable_version + len(self.applied)


@dataclass(frozen=True, slots=True)
class Ledger:
    """All batches of all nodes."""

    read_up_to: int = 0
    """Highest sequence that was read."""
    pending: Mapping[str, int] = field(default_factory=dict)
    """Sequences of batches in no durable checkpoint, by id, in the order of acceptance."""
    skipped: frozenset[int] = frozenset()
    """Sequences above the watermark that no weights will contain."""
    lineages: Mapping[int, Lineage] = field(default_factory=dict)
    """By node."""

    @classmethod
    def restore(cls, lineages: Mapping[int, Lineage], skipped: Iterable[int], watermark: int) -> Self:
        """What durable checkpoints say; `watermark` is the highest of theirs, and thus true for all."""
        done = frozenset(skipped).union(*(lineage.sequences for lineage in lineages.values()))
        while watermark + 1 in done:
            watermark += 1
        return cls(watermark, {}, frozenset(skipped), dict(lineages))._pruned()

    @property
    def watermark(self) -> int:
        """The highest sequence such that it and all below it are done."""
        return min(self.pending.values(), default=self.read_up_to + 1) - 1

    def lineage(self, node: int) -> Lineage:
        return self.lineages.get(node, Lineage())

    def is_done(self, sequence: int) -> bool:
        if sequence <= self.read_up_to:
            return sequence not in self.pending.values()
        return sequence in self.skipped or any(sequence in each.sequences for each in self.lineages.values())

    def knows(self, batch_id: str) -> bool:
        """Whether a batch of this id is pending or durable: another one is a duplicate."""
        return batch_id in self.pending or self.node_of_durable(batch_id) is not None

    def node_of_durable(self, batch_id: str) -> int | None:
        """The node whose durable checkpoint contains the batch; None when there is none."""
        return next((node for node, each in self.lineages.items() if batch_id in each.recent_ids), None)

    def accept(self, sequence: int, batch_id: str) -> Self:
        """Take in a new batch."""
        assert not self.is_done(sequence) and not self.knows(batch_id)
        return replace(
            self,
            pending={**self.pending, batch_id: sequence},
            read_up_to=max(self.read_up_to, sequence),
        )

    def pass_over(self, sequence: int) -> Self:
        """A sequence that is done was read."""
        return replace(self, read_up_to=max(self.read_up_to, sequence))._pruned()

    def skip(self, sequence: int) -> Self:
        """Never apply what stands at `sequence`: it is refused, or repeats another batch."""
        pending = {batch_id: other for batch_id, other in self.pending.items() if other != sequence}
        read_up_to = max(self.read_up_to, sequence)
        return replace(
            self, pending=pending, skipped=self.skipped | {sequence}, read_up_to=read_up_to
        )._pruned()

    def apply(self, node: int, batch_id: str) -> Self:
        """The node's weights now contain the batch."""
        assert batch_id in self.pending
        lineage = self.lineage(node)
        return self._with(node, replace(lineage, applied=(*lineage.applied, batch_id)))

    def roll_back(self, node: int) -> Self:
        """The node goes back to its durable checkpoint; what it had applied since is merely pending."""
        return self._with(node, replace(self.lineage(node), applied=()))

    def make_durable(self, node: int, version: int) -> Self:
        """A durable checkpoint of the node contains its first `version` steps."""
        lineage = self.lineage(node)
        num_saved = version - lineage.durable_version
        assert 0 <= num_saved <= len(lineage.applied)
        saved = lineage.applied[:num_saved]
        ids = [*lineage.recent_ids, *saved][-MAX_RECENT_IDS:]
        grown = Lineage(
            durable_version=version,
            sequences=lineage.sequences | {self.pending[batch_id] for batch_id in saved},
            recent_ids=dict.fromkeys(ids),
            applied=lineage.applied[num_saved:],
        )
        pending = {batch_id: each for batch_id, each in self.pending.items() if batch_id not in saved}
        return replace(self._with(node, grown), pending=pending)._pruned()

    def _with(self, node: int, lineage: Lineage) -> Self:
        return replace(self, lineages={**self.lineages, node: lineage})

    def _pruned(self) -> Self:
        """Forget single sequences that the watermark covers."""
        low = self.watermark
        return replace(
            self,
            skipped=frozenset(each for each in self.skipped if each > low),
            lineages={
                node: replace(lineage, sequences=frozenset(each for each in lineage.sequences if each > low))
                for node, lineage in self.lineages.items()
            },
        )
