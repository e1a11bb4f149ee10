"""Which KV-cache blocks each sequence has, and which of them it shares with others that begin alike."""

from collections.abc import Iterable
from typing import Literal

from services.stage_worker.node.blocks import BlockAllocator
from services.stage_worker.node.prefix_cache import Key, PrefixCache
from services.stage_worker.node.sequence import HeldBlocks, Sequence

Placement = Literal["placed", "no room", "soon shared"]


class KVBlocks:
    """Gives sequences blocks as they grow.

    A block is kept for others when every stage has computed it and all before it with one and the same
    weights version. It serves only sequences that begin while this version is the one they run with, so a
    prompt meets no older weights than one that was computed before the last step. (With the rule `newest`
    stages step at their own times: blocks of an iteration that met two versions on its way are not kept, nor
    are any behind them in their sequence.)

    Sequences that begin alike at the same time wait for the first of them: it promises its next full block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._allocator = BlockAllocator(num_blocks, block_size)
        self._cache = PrefixCache(self._allocator)
        self._promised: dict[Key, int] = {}
        """Contents that a sequence is computing, with its number."""
        self._settled: list[Key] = []
        """Promises that were kept or broken since they were asked for."""

    @property
    def num_blocks(self) -> int:
        return self._allocator.num_blocks

    def limit(self, num_blocks: int) -> None:
        """Another stage of the node has room for so many only."""
        self._allocator.limit(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds; some of them may be found again until they are given away."""
        return self._cache.num_free

    def needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return self._allocator.needed(num_tokens)

    def settled(self) -> list[Key]:
        """Contents that nobody needs to wait for any longer, each told once."""
        settled, self._settled = self._settled, []
        return settled

    def place(self, sequence: Sequence, version: int, *, reserve: int) -> tuple[Placement, Key]:
        """Give a sequence that runs with `version` blocks for its tokens, and leave `reserve` blocks free.

        Blocks that hold its beginning are shared. Returns the content too that comes next in it.
        """
        shared, held = self._find(sequence, version)
        following = self._key(sequence, held, version)
        if following in self._promised and self._can_share(sequence, held):
            return "soon shared", following
        num_new = self.needed(sequence.num_tokens) - len(shared)
        if num_new + reserve > self.num_free - self._cache.num_idle_of(shared):
            return "no room", following
        self._cache.share(shared)
        held.blocks = [*shared, *self._cache.allocate(num_new)]
        sequence.held, sequence.num_cached = held, len(shared) * self.block_size
        self._promise(sequence, version)
        return "placed", following

    def num_missing(self, sequence: Sequence, num_rows: int) -> int:
        """Blocks that the sequence's next rows need beyond those it has."""
        return max(0, self.needed(sequence.num_cached + num_rows) - len(sequence.held.blocks))

    def grow(self, sequence: Sequence, num_rows: int) -> bool:
        """Give a sequence blocks for its next rows; False: there are not enough."""
        num_new = self.num_missing(sequence, num_rows)
        if num_new > self.num_free:
            return False
        sequence.held.blocks.extend(self._cache.allocate(num_new))
        return True

    def computed(self, sequence: Sequence, num_rows: int, version: int | None) -> None:
        """Keep the blocks that are full: all stages have the sequence's first `num_rows`.

        `version`: with which all stages have computed the last ones; None: with different ones.
        """
        held = sequence.held
        if held.version is None:
            held.version = version
        if version is None or held.version != version:
            held.is_mixed = True
        if held.is_mixed or version is None:
            self._settle(held)
            return
        while (held.num_kept + 1) * self.block_size <= num_rows:
            self._settle(held)
            key = self._key(sequence, held, version)
            held.last_name = self._cache.keep(held.blocks[held.num_kept], key)
            held.num_kept += 1
        if held.promised is None:
            self._promise(sequence, version)

    def release(self, sequence: Sequence) -> None:
        """Take a sequence its blocks."""
        self._settle(sequence.held)
        self._cache.release(sequence.held.blocks)
        sequence.held = HeldBlocks()
        sequence.num_cached = sequence.num_known_blocks = 0

    def forget(self, running: Iterable[Sequence]) -> None:
        """Weights or stages are other ones: nothing that was computed until now is shared again."""
        for sequence in running:
            self._settle(sequence.held)
            sequence.held.is_mixed = True
        self._cache.clear()

    def _can_share(self, sequence: Sequence, held: HeldBlocks) -> bool:
        """Whether its next block can be another's.

        The row of its last token is always its own, and so are those of a prompt that has to be scored.
        """
        return (held.num_kept + 1) * self.block_size < sequence.num_tokens and not sequence.is_unscored

    def _find(self, sequence: Sequence, version: int) -> tuple[list[int], HeldBlocks]:
        """Kept blocks that hold the sequence's beginning, and what it is like with them."""
        held, shared = HeldBlocks(), list[int]()
        while self._can_share(sequence, held):
            found = self._cache.find(self._key(sequence, held, version))
            if found is None:
                break
            block, held.last_name = found
            held.num_kept += 1
            held.version = version
            shared.append(block)
        return shared, held

    def _key(self, sequence: Sequence, held: HeldBlocks, version: int) -> Key:
        """The content of the block behind those of its blocks that are kept."""
        start = held.num_kept * self.block_size
        return Key(held.last_name, sequence.tokens(start, start + self.block_size), version)

    def _promise(self, sequence: Sequence, version: int) -> None:
        """Others that begin alike wait for its next block, if its tokens are known."""
        held = sequence.held
        if (held.num_kept + 1) * self.block_size <= sequence.num_tokens:
            key = self._key(sequence, held, version)
            if self._promised.setdefault(key, sequence.number) == sequence.number:
                held.promised = key

    def _settle(self, held: HeldBlocks) -> None:
        if held.promised is not None:
            del self._promised[held.promised]
            self._settled.append(held.promised)
            held.promised = None
