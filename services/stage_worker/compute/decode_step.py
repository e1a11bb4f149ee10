"""One token for each running sequence, in fixed memory: always the same launches, which a GPU can replay.

A step runs in a bucket: so many rows, so many blocks of context for each. Rows and blocks that are not needed
belong to the cache's dummy block. Everything that differs from step to step lies in tensors that stay where
they are, and nothing is read back on the way. The last stage draws in the step; where it is the first one,
too, the next step can go on from its tokens before the host has seen them.

Shape letters: R rows of a bucket, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Final, TypeVar

import torch
from torch import Tensor

from services.stage_worker.compute.attention.chunks import Chunk, slots_of
from services.stage_worker.compute.attention.kernels import PagedKernel
from services.stage_worker.compute.attention.static import StaticAttention
from services.stage_worker.compute.graphs import Capture, Program
from services.stage_worker.compute.kv_cache import PagedKVCache
from services.stage_worker.compute.readback import Readback
from services.stage_worker.compute.sampling.step import Drawing, StepSampler
from shared.model.stage import Stage

_NUM_COLUMNS: Final = 4
"""Token, position, slot and length, before the blocks."""
_FEWEST_BLOCKS: Final = 16


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
        kernel: PagedKernel | None = None,
    ) -> None:
        """`kernel`: reads blocks in place; None: they are gathered."""
        self._stage = stage
        self._kernel = kernel
        self._cache = cache
        self._buckets = sorted(buckets(max_rows, max_blocks), key=lambda one: (one.num_rows, one.num_blocks))
        self._integers = torch.zeros(
            max_rows, _NUM_COLUMNS + max_blocks, dtype=torch.int32, device=cache.device
        )
        self._hidden = torch.zeros(max_rows, stage.hidden_size, dtype=dtype, device=cache.device)
        """Inputs of a stage that is not the first."""
        self._sampler = (
            StepSampler(max_rows=max_rows, vocab_size=stage.vocab_size, dtype=dtype, device=cache.device)
            if stage.layers.is_last
            else None
        )
        self._programs: dict[Bucket, Program] = {}

    def prepare(self, capture: Capture) -> None:
        """Make the program of each bucket; it may be run for that, on the dummy block."""
        for bucket in sorted(self._buckets, key=lambda one: (-one.num_blocks, -one.num_rows)):
            self._fill([], bucket)
            self._programs[bucket] = capture(partial(self._forward, bucket))
        if self._sampler is not None:
            self._sampler.prepare(capture, list({bucket.num_rows for bucket in self._buckets}))

    def bucket_of(self, chunks: Sequence[Chunk]) -> Bucket | None:
        """The smallest bucket that these chunks fit in, if they are decode rows and there is one."""
        if any(chunk.num_tokens != 1 for chunk in chunks):
            return None
        num_blocks = max(ceil(chunk.end / self._cache.block_size) for chunk in chunks)
        fitting = (
            one for one in self._buckets if one.num_rows >= len(chunks) and one.num_blocks >= num_blocks
        )
        return next(fitting, None)

    def run(self, bucket: Bucket, chunks: Sequence[Chunk], inputs: Sequence[int] | Tensor) -> Tensor:
        """The stage's outputs for these decode rows: hidden states [rows, H], or logits [rows, V].

        `inputs`: token ids, or hidden states [rows, H]. The outputs are good until the next step.
        """
        if isinstance(inputs, Tensor):
            self._hidden[: len(chunks)] = inputs
            self._fill(chunks, bucket)
        else:
            self._fill(chunks, bucket, inputs)
        return self._programs[bucket]()[: len(chunks)]

    def run_on(self, bucket: Bucket, chunks: Sequence[Chunk], rows: Sequence[int]) -> Tensor:
        """The same where the token of each chunk is the one that was drawn last for the row in `rows`."""
        return self.run(bucket, chunks, [_as_token(row) for row in rows])

    def draw(self, bucket: Bucket, drawings: Sequence[Drawing]) -> Readback:
        """Draw from the last step's logits, at the last stage: a token, or NO_TOKEN, for each of its rows."""
        assert self._sampler is not None
        return self._sampler.draw(bucket.num_rows, drawings)

    def _fill(self, chunks: Sequence[Chunk], bucket: Bucket, tokens: Sequence[int] | None = None) -> None:
        """All numbers in one transfer."""
        cache, num_columns = self._cache, self._integers.size(1)
        slots, tokens = slots_of(chunks, cache.block_size), tokens or [0] * len(chunks)
        rows = [
            [token, chunk.start, slot, chunk.end, *chunk.blocks_of(chunk.end, cache.block_size)]
            for token, chunk, slot in zip(tokens, chunks, slots, strict=True)
        ]
        rows += [[0, 0, cache.dummy_block * cache.block_size, 1]] * (bucket.num_rows - len(chunks))
        filled = [row + [cache.dummy_block] * (num_columns - len(row)) for row in rows]
        on_host = torch.tensor(filled, dtype=torch.int32, pin_memory=cache.device != "cpu")
        self._integers[: bucket.num_rows].copy_(on_host, non_blocking=True)

    def _forward(self, bucket: Bucket) -> Tensor:
        """Everything that one step launches."""
        integers = self._integers[: bucket.num_rows, : _NUM_COLUMNS + bucket.num_blocks]
        token_R, position_R, slot_R, length_R = integers[:, :_NUM_COLUMNS].long().unbind(1)
        attention = StaticAttention(self._cache, slot_R, length_R, integers[:, _NUM_COLUMNS:], self._kernel)
        inputs = self._known(token_R) if self._stage.layers.is_first else self._hidden[: bucket.num_rows]
        outputs = self._stage.forward(inputs, position_R, attention)
        if self._sampler is None:
            return outputs
        return self._sampler.logits_RV[: bucket.num_rows].copy_(outputs)

    def _known(self, token_R: Tensor) -> Tensor:
        """The tokens, with those of the last draw in the place of its rows."""
        if self._sampler is None:
            return token_R
        drawn_R = self._sampler.tokens_R[_as_token(token_R).clamp(min=0)]
        return torch.where(token_R < 0, drawn_R.clamp(min=0), token_R)


_Number = TypeVar("_Number", int, Tensor)


def _as_token(row: _Number) -> _Number:
    """A row of the last draw among tokens, which are never negative; its own inverse."""
    return -1 - row
