"""Which checkpoint each node goes back to."""

from collections.abc import Collection
from pathlib import Path

from shared.checkpoints import Checkpoint


class NewestCheckpoints:
    """The newest durable checkpoint of each node that has any."""

    def __init__(self, by_node: dict[int, Checkpoint], *, shares_weights: bool) -> None:
        """`shares_weights`: the newest of any node is that of all."""
        self._by_node = by_node
        self._shares_weights = shares_weights

    def of(self, node: int) -> Checkpoint | None:
        if not self._shares_weights:
            return self._by_node.get(node)
        return max(self._by_node.values(), key=lambda each: each.manifest.version, default=None)

    def folder_of(self, node: int) -> Path | None:
        newest = self.of(node)
        return newest.folder if newest else None

    def add(self, checkpoint: Checkpoint) -> None:
        """Note a checkpoint that its node has just made."""
        self._by_node[checkpoint.manifest.node] = checkpoint

    def roll_back(self, nodes: Collection[int], target: Checkpoint) -> None:
        """Note that newer checkpoints of these nodes are gone."""
        for node in nodes:
            self._by_node.pop(node, None)
        self.add(target)
