"""KV-cache blocks that outlive their sequence: a later text that begins alike need not be computed there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.stage_worker.node.blocks import BlockAllocator

NOTHING = 0
"""The text before a first block."""


class Key(NamedTuple):
    """The content of a full block: its keys and values follow from these three, and from nothing else."""

    before: int
    """The name of the kept block before it, which stands for the whole text up to there."""
    tokens: tuple[int, ...]
    version: int
    """The weights version with which every stage computed the block and all before it."""


@dataclass(slots=True)
class _Kept:
    """A block that can be found again."""

    key: Key
    name: int
    """No other content ever has the same name, so that equal keys are equal texts."""
    num_holders: int


class PrefixCache:
    """Hands out blocks, and finds those that hold the beginning of a text.

    A block has one holder, unless it is kept: then it may have more, or none. A kept block without a holder
    counts as free; the one that was let go of longest ago is given to others first. Holders let go of the end
    of a text before its beginning, so no block goes while one behind it can still be found.
    """

    def __init__(self, allocator: BlockAllocator) -> None:
        self._allocator = allocator
        self._block_by_key: dict[Key, int] = {}
        self._kept: dict[int, _Kept] = {}
        """By block."""
        self._idle: dict[int, None] = {}
        """Kept blocks without a holder, longest idle first."""
        self._last_name = NOTHING

    @property
    def num_free(self) -> int:
        return self._allocator.num_free + len(self._idle)

    def allocate(self, num_blocks: int) -> tuple[int, ...]:
        """Take blocks; the caller has checked `num_free`."""
        while self._allocator.num_free < num_blocks and self._idle:
            self._forget(next(iter(self._idle)))
        return self._allocator.allocate(num_blocks)

    def find(self, key: Key) -> tuple[int, int] | None:
        """The block with this content and its name; None: there is none."""
        block = self._block_by_key.get(key)
        return None if block is None else (block, self._kept[block].name)

    def share(self, blocks: Sequence[int]) -> None:
        """Share kept blocks."""
        for block in blocks:
            self._kept[block].num_holders += 1
            self._idle.pop(block, None)

    def num_idle_of(self, blocks: Sequence[int]) -> int:
        """How many of these kept blocks count as free."""
        return sum(block in self._idle for block in blocks)

    def keep(self, block: int, key: Key) -> int:
        """Let a block be found that its one holder has filled; returns the name of its content.

        Where another block has that content already, this one stays as it is.
        """
        if (found := self.find(key)) is not None:
            return found[1]
        self._last_name += 1
        self._kept[block] = _Kept(key, self._last_name, num_holders=1)
        self._block_by_key[key] = block
        return self._last_name

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a text's blocks, given in order."""
        for block in reversed(blocks):
            if (kept := self._kept.get(block)) is None:
                self._allocator.release((block,))
                continue
            kept.num_holders -= 1
            if not kept.num_holders:
                self._idle[block] = None

    def clear(self) -> None:
        """No block can be found any more; those with a holder stay its own.

        A block that several hold goes on to be kept, without its key, until the last one lets go of it.
        """
        self._block_by_key.clear()
        for block in [*self._idle]:
            self._forget(block)

    def _forget(self, block: int) -> None:
        """A block without a holder is free."""
        key = self._kept.pop(block).key
        if self._block_by_key.get(key) == block:
            del self._block_by_key[key]
        del self._idle[block]
        self._allocator.release((block,))
