"""One token for each running sequence, in fixed memory: always the same launches, which a GPU can replay.

A step runs in a bucket: so many rows, so many blocks of context for each. Rows and blocks that are not needed
belong to the cache's dummy block. Everything that differs from step to step lies in two tensors that stay
where they are, and nothing is read back on the way.

Shape letters: R rows of a bucket, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Final, TypeAlias

import torch
from torch import Tensor

from services.stage_worker.compute.attention.chunks import Chunk, slots_of
from services.stage_worker.compute.attention.static import StaticAttention
from services.stage_worker.compute.kv_cache import PagedKVCache
from shared.model.stage import Stage

_NUM_COLUMNS: Final = 4
"""Token, position, slot and length, before the blocks."""
_FEWEST_BLOCKS: Final = 16

Program: TypeAlias = Callable[[], Tensor]
Capture: TypeAlias = Callable[[Program], Program]


@dataclass(frozen=True, slots=True)
class Bucket:
    """The size of a step."""

    num_rows: int
    num_blocks: int
    """Room for each row's context."""


def buckets(max_rows: int, max_blocks: int) -> list[Bucket]:
    """All sizes, the largest first: what the others need lies in its memory, too."""
    rows = _doubling(1, max_rows)
    blocks = _doubling(min(_FEWEST_BLOCKS, max_blocks), max_blocks)
    return [Bucket(some, many) for many in reversed(blocks) for some in reversed(rows)]


def _doubling(first: int, last: int) -> list[int]:
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(min(2 * sizes[-1], last))
    return sizes


class DecodeStep:
    """Runs a stage over decode rows. The weights in place must stay there, only their values may change."""

    def __init__(
        self,
        stage: Stage,
        cache: PagedKVCache,
        *,
        max_rows: int,
        max_blocks: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._stage = stage
        self._cache = cache
        self._buckets = sorted(buckets(max_rows, max_blocks), key=lambda one: (one.num_rows, one.num_blocks))
        self._integers = torch.zeros(
            max_rows, _NUM_COLUMNS + max_blocks, dtype=torch.int32, device=cache.device
        )
        self._hidden = torch.zeros(max_rows, stage.hidden_size, dtype=dtype, device=cache.device)
        """Inputs of a stage that is not the first."""
        self._programs: dict[Bucket, Program] = {}

    def prepare(self, capture: Capture) -> None:
        """Make the program of each bucket; it may be run for that, on the dummy block."""
        for bucket in sorted(self._buckets, key=lambda one: (-one.num_blocks, -one.num_rows)):
            self._fill([], bucket, None)
            self._programs[bucket] = capture(partial(self._forward, bucket))

    def bucket_of(self, chunks: Sequence[Chunk]) -> Bucket | None:
        """The smallest bucket that these chunks fit in, if they are decode rows and there is one."""
        if any(chunk.num_tokens != 1 for chunk in chunks):
            return None
        num_blocks = max(ceil(chunk.end / self._cache.block_size) for chunk in chunks)
        fitting = (
            one for one in self._buckets if one.num_rows >= len(chunks) and one.num_blocks >= num_blocks
        )
        return next(fitting, None)

    def run(self, bucket: Bucket, chunks: Sequence[Chunk], inputs: Tensor) -> Tensor:
        """The stage's outputs for these decode rows: hidden states [rows, H], or logits [rows, V].

        `inputs`: token ids [rows], or hidden states [rows, H]. The outputs are good until the next step.
        """
        self._fill(chunks, bucket, inputs)
        return self._programs[bucket]()[: len(chunks)]

    def _fill(self, chunks: Sequence[Chunk], bucket: Bucket, inputs: Tensor | None) -> None:
        """All numbers in one transfer."""
        cache, num_columns = self._cache, self._integers.size(1)
        slots = slots_of(chunks, cache.block_size)
        rows = [
            [0, chunk.start, slot, chunk.end, *chunk.blocks_of(chunk.end, cache.block_size)]
            for chunk, slot in zip(chunks, slots, strict=True)
        ]
        rows += [[0, 0, cache.dummy_block * cache.block_size, 1]] * (bucket.num_rows - len(chunks))
        filled = [row + [cache.dummy_block] * (num_columns - len(row)) for row in rows]
        on_host = torch.tensor(filled, dtype=torch.int32, pin_memory=cache.device != "cpu")
        self._integers[: bucket.num_rows].copy_(on_host, non_blocking=True)
        if inputs is not None and self._stage.layers.is_first:
            self._integers[: len(chunks), 0] = inputs
        elif inputs is not None:
            self._hidden[: len(chunks)] = inputs

    def _forward(self, bucket: Bucket) -> Tensor:
        """Everything that one step launches."""
        integers = self._integers[: bucket.num_rows, : _NUM_COLUMNS + bucket.num_blocks]
        token_R, position_R, slot_R, length_R = integers[:, :_NUM_COLUMNS].long().unbind(1)
        attention = StaticAttention(self._cache, slot_R, length_R, integers[:, _NUM_COLUMNS:])
        inputs = token_R if self._stage.layers.is_first else self._hidden[: bucket.num_rows]
        return self._stage.forward(inputs, position_R, attention)
