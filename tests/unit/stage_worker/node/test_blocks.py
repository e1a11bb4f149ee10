"""Blocks of the KV cache are handed out once, until they are given back."""

import pytest

from services.stage_worker.node.blocks import BlockAllocator


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_needed_blocks_are_rounded_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockAllocator(8, 4).needed(num_tokens) == num_blocks


def test_a_block_is_handed_out_once_until_it_is_released() -> None:
    allocator = BlockAllocator(5, 4)
    first, second = allocator.allocate(2), allocator.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert allocator.num_free == 0
    allocator.release(first)
    assert allocator.num_free == 2
    assert sorted(allocator.allocate(2)) == sorted(first)


def test_more_blocks_than_are_free_are_not_handed_out() -> None:
    with pytest.raises(AssertionError):
        BlockAllocator(2, 4).allocate(3)


def test_a_limit_leaves_what_was_taken_and_hands_out_no_more() -> None:
    allocator = BlockAllocator(8, 4)
    allocator.allocate(3)
    allocator.limit(5)
    assert (allocator.num_blocks, allocator.num_free) == (5, 2)
    allocator.limit(1)
    assert (allocator.num_blocks, allocator.num_free) == (3, 0)
    allocator.limit(9)
    assert allocator.num_blocks == 3
