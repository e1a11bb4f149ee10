"""Rows that stay side by side attend like rows whose blocks are gathered anew for each iteration."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.stage_worker.compute.attention.gathered import GatheredDecoder
from services.stage_worker.compute.attention.iteration import PagedAttention
from services.stage_worker.compute.attention.windows import WindowedDecoder
from services.stage_worker.compute.kv_cache import PagedKVCache

BLOCK_SIZE, NUM_BLOCKS, NUM_LAYERS = 4, 48, 2
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8


@dataclass
class Sequence:
    wanted: int
    length: int = 0
    blocks: list[int] = field(default_factory=list)


class Node:
    """Sequences that come, run, are preempted and go, as a node's scheduler might have it."""

    def __init__(self, draw: st.DataObject) -> None:
        self._draw = draw
        self._free = list(range(NUM_BLOCKS))
        self._running: list[Sequence] = []

    def _pick(self, low: int, high: int) -> int:
        return self._draw.draw(st.integers(low, high))

    def _let_go(self, sequence: Sequence) -> None:
        self._free += sequence.blocks
        sequence.blocks, sequence.length = [], 0

    def iterations(self, count: int) -> Iterator[list[tuple[int, int, list[int]]]]:
        for _ in range(count):
            for _ in range(self._pick(0, 2)):
                self._running.append(Sequence(wanted=self._pick(1, 20)))
            if self._running and self._pick(0, 5) == 0:
                self._let_go(self._running[self._pick(0, len(self._running) - 1)])  # to be computed again
            chunks = [chunk for each in self._running if (chunk := self._chunk(each))]
            for done in [each for each in self._running if each.length == each.wanted]:
                self._let_go(done)
                self._running.remove(done)
            if chunks:
                yield chunks

    def _chunk(self, sequence: Sequence) -> tuple[int, int, list[int]] | None:
        start, takes = sequence.length, min(self._pick(1, 3), sequence.wanted - sequence.length)
        missing = -(-(start + takes) // BLOCK_SIZE) - len(sequence.blocks)
        if missing > len(self._free) or self._pick(0, 9) == 0:
            return None  # it waits
        sequence.blocks += [self._free.pop() for _ in range(missing)]
        sequence.length += takes
        return start, takes, list(sequence.blocks)


def new_cache() -> PagedKVCache:
    return PagedKVCache(NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)


def attend(
    attention: PagedAttention, layer: int, query: Tensor, key_value: Tensor, window: int | None
) -> Tensor:
    return attention.attend_joined(layer, query, key_value, scaling=0.5, sliding_window=window)


@pytest.mark.parametrize("num_windows", [1, 2])
@settings(max_examples=40)
@given(data=st.data(), sliding_window=st.sampled_from([None, 3]))
def test_windows_change_nothing(data: st.DataObject, num_windows: int, sliding_window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    caches = [new_cache(), new_cache()]
    decoders = [WindowedDecoder(caches[0], num_windows), GatheredDecoder(caches[1])]
    for chunks in Node(data).iterations(12):
        both = [
            PagedAttention(cache, chunks, decoder) for cache, decoder in zip(caches, decoders, strict=True)
        ]
        num_tokens = sum(count for _, count, _ in chunks)
        for layer in range(NUM_LAYERS):
            query = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, generator=generator)
            key_value = torch.randn(num_tokens, 2 * NUM_KV_HEADS, HEAD_DIM, generator=generator)
            got, expected = (attend(each, layer, query, key_value, sliding_window) for each in both)
            torch.testing.assert_close(got, expected)


class CountingCache(PagedKVCache):
    num_gathered = 0

    def gather(self, layer: int, blocks: Tensor) -> Tensor:
        self.num_gathered += 1
        return super().gather(layer, blocks)


def test_a_row_is_gathered_once() -> None:
    cache = CountingCache(NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    decoder, rows = WindowedDecoder(cache), torch.ones(1, NUM_HEADS, HEAD_DIM)
    for start in range(3, 9):
        attention = PagedAttention(cache, [(start, 1, [3, 1, 2])], decoder)
        for layer in range(NUM_LAYERS):
            attend(attention, layer, rows, rows, None)
    assert cache.num_gathered == NUM_LAYERS


def test_windows_take_no_more_memory_than_the_cache() -> None:
    cache = CountingCache(1, 20, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    decoder, rows = WindowedDecoder(cache), torch.ones(2, NUM_HEADS, HEAD_DIM)
    for start in (5, 6):  # two rows of 64 tokens would take more than 80
        attention = PagedAttention(cache, [(start, 1, [0, 1]), (start, 1, [2, 3])], decoder)
        attend(attention, 0, rows, rows, None)
    assert cache.num_gathered == 2


def test_a_window_that_cannot_grow_takes_another_shape() -> None:
    """Many short rows, and then one long one, each of which fits, where both sizes together do not."""
    cache = CountingCache(1, 100, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    decoder = WindowedDecoder(cache)
    for start in (5, 6):
        rows = torch.ones(6, NUM_HEADS, HEAD_DIM)
        chunks = [(start, 1, [2 * number, 2 * number + 1]) for number in range(6)]
        attend(PagedAttention(cache, chunks, decoder), 0, rows, rows, None)
    assert cache.num_gathered == 6
    for start in (300, 301, 302):
        row = torch.ones(1, NUM_HEADS, HEAD_DIM)
        chunks = [(start, 1, list(range(12, 100)))]
        attend(PagedAttention(cache, chunks, decoder), 0, row, row, None)
    assert cache.num_gathered == 7
