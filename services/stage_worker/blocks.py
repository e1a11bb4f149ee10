"""Which KV-cache blocks are free. Block ids are the same on every stage of a node."""


class BlockAllocator:
    """Hands out block ids; integers only, the memory is the KV cache's."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> tuple[int, ...]:
        """Take blocks; the caller has checked `num_free`."""
        assert num_blocks <= len(self._free), (num_blocks, len(self._free))
        return tuple(self._free.pop() for _ in range(num_blocks))

    def release(self, blocks: tuple[int, ...]) -> None:
        """Give blocks back."""
        self._free.extend(reversed(blocks))
        assert len(self._free) <= self.num_blocks
