"""The pieces of sequences that one iteration runs, as attention sees them: whole numbers only."""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple


class Chunk(NamedTuple):
    """Tokens `start` to `start + num_tokens - 1` of one sequence, whose context is in `blocks`."""

    start: int
    num_tokens: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        """The sequence's length after this chunk."""
        return self.start + self.num_tokens

    def blocks_of(self, num_tokens: int, block_size: int) -> tuple[int, ...]:
        """The blocks that hold the sequence's first `num_tokens` tokens."""
        return tuple(self.blocks[: ceil(num_tokens / block_size)])

    def written_blocks(self, block_size: int) -> Sequence[int]:
        """The blocks that this chunk writes."""
        return self.blocks[self.start // block_size : ceil(self.end / block_size)]


def slots_of(chunks: Sequence[Chunk], block_size: int) -> list[int]:
    """The slot in the cache of each token, in the order of the flat row."""
    return [
        chunk.blocks[place // block_size] * block_size + place % block_size
        for chunk in chunks
        for place in range(chunk.start, chunk.end)
    ]
