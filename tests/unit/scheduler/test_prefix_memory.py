"""What the scheduler knows of KV caches, against plain texts; and that requests follow it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from services.scheduler.events import HeartbeatSeen, TasksEnded
from services.scheduler.policies import policy_named
from services.scheduler.policies.base import Place
from services.scheduler.prefix_memory import MAX_BLOCKS, PrefixMemory, beginnings_of
from tests.support.cluster import heartbeat
from tests.support.policies import ask, assign, cluster, request

LEMIX = policy_named("lemix", lambda: 0.0)
TEXT = st.lists(st.integers(0, 1), max_size=12).map(tuple)


@given(st.lists(TEXT, max_size=8), TEXT, st.integers(1, 3))
def test_the_longest_beginning_that_came_before_is_found(
    texts: list[tuple[int, ...]], prompt: tuple[int, ...], block_size: int
) -> None:
    memory = PrefixMemory()
    for text in texts:
        memory.add(beginnings_of(text, block_size), capacity=1000)

    def has_come(num_tokens: int) -> bool:
        beginning = prompt[:num_tokens]
        return any(text[:num_tokens] == beginning and len(text) > num_tokens for text in texts)

    lengths = range(block_size, len(prompt), block_size)
    expected = max((length for length in lengths if has_come(length)), default=0)
    assert memory.num_blocks(beginnings_of(prompt, block_size)) * block_size == expected


def test_the_longest_unused_blocks_go_first_and_ends_before_beginnings() -> None:
    memory = PrefixMemory()
    first, second = beginnings_of((1,) * 9, 2), beginnings_of((2,) * 5, 2)
    memory.add(first, capacity=5)
    memory.add(second, capacity=5)
    assert memory.num_blocks(first) == 3
    assert memory.num_blocks(second) == 2
    memory.serves(1)
    assert memory.num_blocks(second) == 0


def test_only_the_first_blocks_of_a_long_prompt_count() -> None:
    assert len(beginnings_of((1,) * 100_000, 16)) == MAX_BLOCKS
    assert beginnings_of((1,) * 16, 16) == ()


def test_a_prompt_goes_to_the_node_that_has_computed_its_beginning() -> None:
    state = cluster(0, 1, 2)
    first = structs.replace(request("first", 0), prompt=tuple(range(5, 405)))
    place = ask(state, LEMIX, first, 0.0)
    assert isinstance(place, Place) and place.cached_tokens == 0
    assign(state, first, replace(place, node=2), 0.0)
    state.apply(TasksEnded(("first",), 1.0))
    assign(state, request("other", 400), Place(0), 1.0)
    state.apply(TasksEnded(("other",), 2.0))

    again = ask(state, LEMIX, structs.replace(first, task_id="again"), 3.0)
    assert isinstance(again, Place) and again.forecast is not None
    assert (again.node, again.cached_tokens) == (2, 384)
    assert again.forecast.end_s - 3.0 == pytest.approx(2 * 0.016)
    unlike = ask(state, LEMIX, request("unlike", 400), 3.0)
    assert isinstance(unlike, Place) and unlike.node == 0

    for stage in range(2):
        beat = heartbeat(2, stage, num_stages=2)
        beat = structs.replace(beat, serving_version=1, kv_block_size=16, kv_blocks_total=1024)
        state.apply(HeartbeatSeen(beat, 3.0))
    fresh = ask(state, LEMIX, structs.replace(first, task_id="fresh"), 3.0)
    assert isinstance(fresh, Place)
    assert (fresh.node, fresh.cached_tokens) == (0, 0)
