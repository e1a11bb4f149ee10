"""What a sequence left in its blocks never reaches the next one, not even when it is no number."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from services.stage_worker.compute.attention.iteration import PagedAttention
from services.stage_worker.compute.kv_cache import PagedKVCache

BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 4, 2, 8
LONG, SHORT = (6, 2, 4, 0), (1, 5, 3, 7)
"""Blocks of two sequences, reserved at their admission."""
ITERATIONS = [
    [(0, 5, LONG), (0, 3, SHORT)],
    [(5, 6, LONG), (3, 1, SHORT)],
    *([(11 + step, 1, LONG), (4 + step, 1, SHORT)] for step in range(4)),
]
"""Prompts, a second piece of one beside a token, and tokens over the ends of blocks."""


def outputs(cache: PagedKVCache, sliding_window: int | None) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(5)
    for chunks in ITERATIONS:
        num_tokens = sum(count for _, count, _ in chunks)
        query = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, generator=generator)
        key_value = torch.randn(num_tokens, 2 * NUM_KV_HEADS, HEAD_DIM, generator=generator)
        attention = PagedAttention(cache, chunks)
        yield attention.attend_joined(0, query, key_value, scaling=0.5, sliding_window=sliding_window)


@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("left", [float("nan"), float("inf")])
def test_freed_blocks_may_hold_anything(left: float, sliding_window: int | None) -> None:
    clean = PagedKVCache(1, 8, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    used = PagedKVCache(1, 8, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    every_slot = torch.arange(8 * BLOCK_SIZE)
    used.write(0, every_slot, torch.full((2 * NUM_KV_HEADS, len(every_slot), HEAD_DIM), left))

    for got, expected in zip(outputs(used, sliding_window), outputs(clean, sliding_window), strict=True):
        assert torch.equal(got, expected)
