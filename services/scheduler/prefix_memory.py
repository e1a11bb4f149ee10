"""The beginnings of prompts that a node's KV cache holds, as far as the scheduler can know. Pure.

A stage worker keeps full blocks of a text, and finds them again for a text that begins alike and runs with
the same weights. The scheduler follows that from the prompts that it has placed.
"""

from collections.abc import Sequence

MAX_BLOCKS = 256
"""A prompt's blocks that are looked at; what comes after them is taken for new."""


def beginnings_of(prompt: Sequence[int], block_size: int) -> tuple[int, ...]:
    """A number for each full block of a prompt, that stands for all tokens up to its end.

    The last token is always computed, so that its block counts only if something follows.
    """
    numbers, before = [], 0
    for start in range(0, min(len(prompt) - block_size, MAX_BLOCKS * block_size), block_size):
        before = hash((before, *prompt[start : start + block_size]))
        numbers.append(before)
    return tuple(numbers)


class PrefixMemory:
    """The blocks of one node, the longest unused first. Each operation costs O(blocks of the prompt)."""

    def __init__(self) -> None:
        self._blocks: dict[int, None] = {}
        self._version: int | None = None

    def num_blocks(self, beginnings: Sequence[int]) -> int:
        """How many of the prompt's blocks are there."""
        for number, each in enumerate(beginnings):
            if each not in self._blocks:
                return number
        return len(beginnings)

    def add(self, beginnings: Sequence[int], capacity: int) -> None:
        """Note that the node computes a prompt; it has room for `capacity` blocks."""
        for each in reversed(beginnings):  # the end of a text is given away before its beginning
            self._blocks.pop(each, None)
            self._blocks[each] = None
        while len(self._blocks) > capacity:
            del self._blocks[next(iter(self._blocks))]

    def serves(self, version: int | None) -> None:
        """Forget everything when the node serves other weights than before."""
        if version != self._version:
            self._version = version
            self._blocks.clear()
