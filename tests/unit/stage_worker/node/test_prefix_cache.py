"""Blocks that are found again by what they hold."""

from services.stage_worker.node.blocks import BlockAllocator
from services.stage_worker.node.kv_blocks import KVBlocks
from services.stage_worker.node.prefix_cache import NOTHING, Key, PrefixCache
from services.stage_worker.node.sequence import Sequence
from tests.unit.stage_worker.support import sequence, task

A, B = (1, 2), (3, 4)


def cache_of(num_blocks: int) -> PrefixCache:
    return PrefixCache(BlockAllocator(num_blocks, 2))


def keep(cache: PrefixCache, *texts: tuple[int, ...], version: int = 0) -> tuple[int, ...]:
    """Fill blocks with a text, one after the other."""
    blocks, name = cache.allocate(len(texts)), NOTHING
    for block, tokens in zip(blocks, texts, strict=True):
        name = cache.keep(block, Key(name, tokens, version))
    return blocks


def find(cache: PrefixCache, *texts: tuple[int, ...], version: int = 0) -> list[int]:
    """The blocks that hold the beginning of a text."""
    blocks, name = [], NOTHING
    for tokens in texts:
        if (found := cache.find(Key(name, tokens, version))) is None:
            break
        block, name = found
        blocks.append(block)
    return blocks


def test_a_text_is_found_as_far_as_it_is_the_same() -> None:
    cache = cache_of(8)
    first, second = keep(cache, A, B)
    assert find(cache, A, B) == [first, second]
    assert find(cache, A, A) == [first]
    assert find(cache, B) == [], "b stands behind a only"
    assert find(cache, A, B, version=1) == []


def test_kept_blocks_without_a_holder_are_free_until_they_are_given_away() -> None:
    cache = cache_of(2)
    blocks = keep(cache, A, B)
    cache.release(blocks)
    assert cache.num_free == 2
    assert find(cache, A, B) == list(blocks)
    assert cache.allocate(1) == blocks[1:], "the end of a text goes before its beginning"
    assert find(cache, A, B) == [blocks[0]]


def test_the_text_that_was_let_go_of_longest_ago_goes_first() -> None:
    cache = cache_of(3)
    old, new = keep(cache, A), keep(cache, B)
    cache.release(old)
    cache.release(new)
    cache.share(old)
    cache.release(old)
    cache.allocate(2)
    assert (find(cache, A), find(cache, B)) == ([*old], [])


def test_a_shared_block_is_free_when_the_last_holder_lets_go() -> None:
    cache = cache_of(2)
    blocks = keep(cache, A, B)
    cache.share(blocks[:1])
    cache.release(blocks)
    assert cache.num_free == 1
    cache.release(blocks[:1])
    assert cache.num_free == 2


def test_the_second_block_with_the_same_content_stays_its_holders_own() -> None:
    cache = cache_of(4)
    first = keep(cache, A, B)
    second = keep(cache, A, B)
    assert find(cache, A, B) == list(first)
    cache.release(second)
    assert cache.num_free == 2
    assert sorted(cache.allocate(2)) == sorted(second)
    assert find(cache, A, B) == list(first)


def test_after_a_clear_nothing_is_found_and_holders_keep_what_they_hold() -> None:
    cache = cache_of(4)
    held, idle = keep(cache, A), keep(cache, B)
    cache.release(idle)
    cache.share(held)
    cache.clear()
    assert (find(cache, A), find(cache, B), cache.num_free) == ([], [], 3)
    cache.release(held)
    cache.release(held)
    assert cache.num_free == 4
    again = keep(cache, A)
    assert find(cache, A) == list(again)
    assert len(cache.allocate(3)) == 3
    assert find(cache, A) == list(again)


# Sequences


def placed(blocks: KVBlocks, one: Sequence, *, version: int = 0) -> Sequence:
    assert blocks.place(one, version, reserve=0)[0] == "placed"
    return one


def computed(blocks: KVBlocks, *, prompt_length: int, version: int | None = 0) -> Sequence:
    """A sequence whose prompt has gone through all stages, and that is over."""
    one = placed(blocks, sequence(prompt_length=prompt_length), version=version or 0)
    blocks.computed(one, prompt_length, version)
    blocks.release(one)
    return one


def num_found(blocks: KVBlocks, *, prompt_length: int, version: int = 0, **fields: bool) -> int:
    """Rows that a new sequence needs not compute."""
    one = sequence(prompt_length=prompt_length)
    one.task = task(prompt_length=prompt_length, **fields)
    rows = placed(blocks, one, version=version).num_cached
    blocks.release(one)
    return rows


def test_full_blocks_are_found_but_never_the_last_token() -> None:
    blocks = KVBlocks(16, 4)
    computed(blocks, prompt_length=9)
    assert [num_found(blocks, prompt_length=length) for length in (3, 4, 5, 8, 9, 20)] == [0, 0, 4, 4, 8, 8]


def test_a_prompt_that_is_to_be_scored_runs_whole() -> None:
    blocks = KVBlocks(16, 4)
    computed(blocks, prompt_length=9)
    assert num_found(blocks, prompt_length=9, prompt_logprobs=True) == 0


def test_blocks_serve_only_the_version_that_every_stage_wrote_them_with() -> None:
    blocks = KVBlocks(16, 4)
    computed(blocks, prompt_length=9, version=3)
    assert num_found(blocks, prompt_length=9, version=4) == 0
    assert num_found(blocks, prompt_length=9, version=3) == 8
    mixed = KVBlocks(16, 4)
    computed(mixed, prompt_length=9, version=None)
    assert num_found(mixed, prompt_length=9) == 0


def test_blocks_behind_a_change_of_weights_are_not_kept() -> None:
    blocks = KVBlocks(16, 4)
    one = placed(blocks, sequence(prompt_length=13))
    blocks.computed(one, 6, 0)
    blocks.computed(one, 13, 1)
    blocks.release(one)
    assert (num_found(blocks, prompt_length=13), num_found(blocks, prompt_length=13, version=1)) == (4, 0)


def test_generated_tokens_are_found_by_the_prompt_that_goes_on_from_them() -> None:
    blocks = KVBlocks(16, 4)
    one = placed(blocks, sequence(prompt_length=3))
    blocks.computed(one, 3, 0)
    one.generated = [3, 4]
    assert blocks.grow(one, 2)
    blocks.computed(one, 5, 0)
    blocks.release(one)
    assert num_found(blocks, prompt_length=9) == 4


def test_other_weights_or_stages_make_all_of_it_worthless() -> None:
    blocks = KVBlocks(16, 4)
    computed(blocks, prompt_length=9)
    running = placed(blocks, sequence(prompt_length=9, first=50))
    blocks.forget([running])
    blocks.computed(running, 9, 0)
    blocks.release(running)
    assert num_found(blocks, prompt_length=9) == 0
    assert blocks.num_free == 16
