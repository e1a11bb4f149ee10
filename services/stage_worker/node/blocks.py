"""Which KV-cache blocks are free. Block ids are the same on every stage of a node."""

from collections.abc import Sequence


class BlockAllocator:
    """Hands out block ids; integers only, the memory is the KV cache's."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_used_ever = 0
        """Blocks from this one on were never taken: most stages of a large simulation take none."""
        self._given_back: list[int] = []

    @property
    def num_free(self) -> int:
        return self.num_blocks - self._num_used_ever + len(self._given_back)

    def limit(self, num_blocks: int) -> None:
        """Hand out no block from this one on, unless it was taken before."""
        self.num_blocks = max(min(self.num_blocks, num_blocks), self._num_used_ever)

    def needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> tuple[int, ...]:
        """Take blocks; the caller has checked `num_free`."""
        assert num_blocks <= self.num_free, (num_blocks, self.num_free)
        again = [self._given_back.pop() for _ in range(min(num_blocks, len(self._given_back)))]
        first_new = self._num_used_ever
        self._num_used_ever += num_blocks - len(again)
        return (*again, *range(first_new, self._num_used_ever))

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back."""
        self._given_back.extend(reversed(blocks))
        assert self.num_free <= self.num_blocks
