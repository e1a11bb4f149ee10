"""Which training batches are where: what each node's weights contain, and what is durably done.

A batch is accepted from the stream (pending), applied on one node, and made durable by that node's
next checkpoint; until then a crash takes it off the node again, and it is still pending. A stream
sequence is done when a durable checkpoint of some node contains its batch, or when it was skipped
(refused, a duplicate, or taken out of the weights by a rollback). Reading goes on after the watermark:
every sequence up to it is done.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Self

MAX_RECENT_IDS = 100_000
"""Batch ids that a checkpoint names, so that a repeated publication is recognised."""
MAX_HELD_OUT = 1_000
"""Batches with held-out examples that a checkpoint names."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """The batches in one node's weights."""

    durable_version: int = 0
    """Optimizer steps in the newest durable checkpoint."""
    sequences: frozenset[int] = frozenset()
    """Sequences above the watermark in that checkpoint."""
    recent_ids: Mapping[str, None] = field(default_factory=dict)
    """Ids in that checkpoint, oldest first: a set that keeps its order."""
    entry: int | None = None
    """The newest entry of that checkpoint in the lineage file; None: there is none."""
    applied: tuple[str, ...] = ()
    """Batches applied since then, in order."""

    @property
    def version(self) -> int:
        """Optimizer steps that the weights contain now."""
        return self.durable_version + len(self.applied)

    def with_saved(self, saved: Mapping[str, int], entry: int | None) -> "Lineage":
        """The lineage once the oldest applied batches are durable; `saved`: their sequences, by id.

        `entry`: see above.
        """
        ids = [*self.recent_ids, *saved][-MAX_RECENT_IDS:]
        return Lineage(
            durable_version=self.durable_version + len(saved),
            sequences=self.sequences.union(saved.values()),
            recent_ids=dict.fromkeys(ids),
            entry=entry,
            applied=self.applied[len(saved) :],
        )

    def begins_like(self, other: "Lineage", num_steps: int) -> bool:
        """Whether the next steps after the same checkpoint are the same."""
        return (self.durable_version, self.entry) == (other.durable_version, other.entry) and self.applied[
            :num_steps
        ] == other.applied[:num_steps]


@dataclass(frozen=True, slots=True)
class Ledger:
    """All batches of all nodes."""

    read_up_to: int = 0
    """Highest sequence that was read."""
    pending: Mapping[str, int] = field(default_factory=dict)
    """Sequences of batches in no durable checkpoint, by id, in the order of acceptance."""
    skipped: frozenset[int] = frozenset()
    """Sequences above the watermark that no weights will contain."""
    discarded_ids: Mapping[str, None] = field(default_factory=dict)
    """Batches that a rollback has taken out of the weights, oldest first: a set that keeps its order."""
    lineages: Mapping[int, Lineage] = field(default_factory=dict)
    """By node."""
    held_out: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The newest batches of which some examples are held out, and which these are, by position."""

    @classmethod
    def restore(
        cls,
        lineages: Mapping[int, Lineage],
        skipped: Iterable[int],
        watermark: int,
        discarded_ids: Iterable[str] = (),
        held_out: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Self:
        """Build the ledger from durable checkpoints; `watermark`, the highest of theirs, holds for all."""
        done = frozenset(skipped).union(*(lineage.sequences for lineage in lineages.values()))
        while watermark + 1 in done:
            watermark += 1
        discarded = dict.fromkeys(discarded_ids)
        return cls(watermark, {}, frozenset(skipped), discarded, dict(lineages), held_out or {})._pruned()

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
        """Whether a batch of this id is pending, durable or discarded: another one is a duplicate."""
        return (
            batch_id in self.pending
            or batch_id in self.discarded_ids
            or self.node_of_durable(batch_id) is not None
        )

    def node_of_durable(self, batch_id: str) -> int | None:
        """The node whose durable checkpoint contains the batch; None when there is none."""
        return next((node for node, each in self.lineages.items() if batch_id in each.recent_ids), None)

    def accept(self, sequence: int, batch_id: str, held_out: tuple[int, ...] = ()) -> Self:
        """Take in a new batch. `held_out`: positions of its examples that do not train."""
        assert not self.is_done(sequence) and not self.knows(batch_id)
        others = {other: each for other, each in self.held_out.items() if other != batch_id}
        newest = [*others.items(), *([(batch_id, held_out)] if held_out else [])][-MAX_HELD_OUT:]
        return replace(
            self,
            pending={**self.pending, batch_id: sequence},
            read_up_to=max(self.read_up_to, sequence),
            held_out=dict(newest),
        )

    def pass_over(self, sequence: int) -> Self:
        """Note that a finished sequence was read."""
        return replace(self, read_up_to=max(self.read_up_to, sequence))._pruned()

    def skip(self, sequence: int) -> Self:
        """Never apply the message at `sequence`: it is refused, or repeats another batch."""
        pending = {batch_id: other for batch_id, other in self.pending.items() if other != sequence}
        read_up_to = max(self.read_up_to, sequence)
        return replace(
            self, pending=pending, skipped=self.skipped | {sequence}, read_up_to=read_up_to
        )._pruned()

    def apply(self, node: int, batch_id: str) -> Self:
        """Note that the node's weights now contain the batch."""
        assert batch_id in self.pending
        lineage = self.lineage(node)
        return self._with(node, replace(lineage, applied=(*lineage.applied, batch_id)))

    def return_to_durable(self, node: int) -> Self:
        """Note that the node goes back to its durable checkpoint; batches only it had applied are pending."""
        return self._with(node, replace(self.lineage(node), applied=()))

    def only_applied_by(self, node: int) -> tuple[str, ...]:
        """Batches that no other node's weights contain, and no durable checkpoint."""
        others = {
            each for other, lineage in self.lineages.items() if other != node for each in lineage.applied
        }
        return tuple(each for each in self.lineage(node).applied if each not in others)

    def share(self, nodes: Iterable[int]) -> Self:
        """Note that the weights of these nodes, which descend from one checkpoint, are merged into one."""
        members = list(nodes)
        applied = self.applied_by(members)
        shared = {node: replace(self.lineage(node), applied=applied) for node in members}
        return replace(self, lineages={**self.lineages, **shared})

    def join(self, node: int) -> Self:
        """Note that the node holds the newest durable checkpoint of any node."""
        newest = max(self.lineages.values(), key=attrgetter("durable_version"), default=Lineage())
        return self._with(node, replace(newest, applied=()))

    def make_durable(self, node: int, version: int, *, entry: int | None = None) -> Self:
        """Note that a durable checkpoint of the node contains its first `version` steps.

        It is one of every node whose weights consist of the same steps. `entry`: its newest one in the
        lineage file.
        """
        lineage = self.lineage(node)
        num_saved = version - lineage.durable_version
        assert 0 <= num_saved <= len(lineage.applied)
        saved = {batch_id: self.pending[batch_id] for batch_id in lineage.applied[:num_saved]}
        lineages = {
            other: each.with_saved(saved, entry) if each.begins_like(lineage, num_saved) else each
            for other, each in {**self.lineages, node: lineage}.items()
        }
        pending = {batch_id: each for batch_id, each in self.pending.items() if batch_id not in saved}
        return replace(self, lineages=lineages, pending=pending)._pruned()

    def num_contained(self, nodes: Collection[int]) -> int:
        """Batches in the weights of these nodes, which are one or descend from one checkpoint."""
        newest = max((self.lineage(node).durable_version for node in nodes), default=0)
        return newest + len(self.applied_by(nodes))

    def applied_by(self, nodes: Iterable[int]) -> tuple[str, ...]:
        """Batches that any of these nodes has applied since its durable checkpoint, each once."""
        return tuple(dict.fromkeys(each for node in nodes for each in self.lineage(node).applied))

    def roll_back(self, nodes: Collection[int], target: Lineage) -> Self:
        """Roll these nodes (one, or all that share their weights) back to an older checkpoint, for good.

        Batches that any of them had applied since are discarded: finished, and in no weights.
        """
        lineages = [self.lineage(node) for node in nodes]
        sequences = frozenset[int]().union(*(lineage.sequences for lineage in lineages))
        applied = self.applied_by(nodes)
        ids = [*(each for lineage in lineages for each in lineage.recent_ids), *applied]
        discarded = [*self.discarded_ids, *(each for each in ids if each not in target.recent_ids)]
        older = replace(target, sequences=sequences & target.sequences, applied=())
        done = {self.pending[batch_id] for batch_id in applied} | (sequences - target.sequences)
        return replace(
            self,
            pending={batch_id: each for batch_id, each in self.pending.items() if batch_id not in applied},
            skipped=self.skipped | done,
            discarded_ids=dict.fromkeys(list(dict.fromkeys(discarded))[-MAX_RECENT_IDS:]),
            lineages={**self.lineages, **dict.fromkeys(nodes, older)},
        )._pruned()

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
