"""Blocks of the KV cache, and who gets them when."""

import pytest
from msgspec import structs

from services.stage_worker.node.admission import Admission
from services.stage_worker.node.blocks import BlockAllocator
from services.stage_worker.node.sequence import Sequence
from shared.errors import RefusedError
from tests.unit.stage_worker.support import sequence


def admission_of(
    allocator: BlockAllocator, *, max_waiting: int, context_length: int | None = None
) -> Admission:
    return Admission(allocator, max_waiting=max_waiting, vocab_size=100, context_length=context_length)


def ids(sequences: list[Sequence]) -> list[str]:
    return [one.task.task_id for one in sequences]


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


def test_a_sequence_gets_all_blocks_that_it_can_ever_need() -> None:
    admission = admission_of(BlockAllocator(8, 4), max_waiting=8)
    admission.offer(sequence(prompt_length=6, max_tokens=4))  # 9 rows: the last token is never cached
    (admitted,) = admission.admit()
    assert len(admitted.blocks) == 3
    assert len(admission) == 0


def test_a_sequence_waits_until_its_blocks_are_free() -> None:
    allocator = BlockAllocator(4, 4)
    admission = admission_of(allocator, max_waiting=8)
    for name in "ab":
        admission.offer(sequence(name, prompt_length=8, max_tokens=5))
    (first,) = admission.admit()
    assert (first.task.task_id, len(admission)) == ("a", 1)
    assert admission.admit() == []
    allocator.release(first.blocks)
    assert ids(admission.admit()) == ["b"]


def test_nobody_overtakes_the_head_of_the_line() -> None:
    allocator = BlockAllocator(4, 4)
    admission = admission_of(allocator, max_waiting=8)
    taken = allocator.allocate(2)
    admission.offer(sequence("large", prompt_length=12))
    admission.offer(sequence("small", prompt_length=1, max_tokens=1))
    assert admission.admit() == []
    allocator.release(taken)
    assert ids(admission.admit()) == ["large"]
    assert ids(admission.waiting()) == ["small"]


def test_what_can_never_fit_is_refused_with_400() -> None:
    admission = admission_of(BlockAllocator(4, 4), max_waiting=8)
    admission.offer(sequence("fits", prompt_length=10, max_tokens=7))
    with pytest.raises(RefusedError, match="18 tokens of KV cache; a node has 16") as refusal:
        admission.offer(sequence("too large", prompt_length=10, max_tokens=8))
    assert refusal.value.code == 400
    assert ids(admission.waiting()) == ["fits"]


def test_an_empty_prompt_is_refused_with_400() -> None:
    with pytest.raises(RefusedError, match="empty") as refusal:
        admission_of(BlockAllocator(4, 4), max_waiting=8).offer(sequence(prompt_length=0))
    assert refusal.value.code == 400


@pytest.mark.parametrize("token", [-1, 100])
def test_a_token_that_the_model_does_not_know_is_refused_with_400(token: int) -> None:
    strange = sequence()
    strange.task = structs.replace(strange.task, prompt=(1, token))
    with pytest.raises(RefusedError, match="tokens are 0 to 99") as refusal:
        admission_of(BlockAllocator(4, 4), max_waiting=8).offer(strange)
    assert refusal.value.code == 400


def test_more_than_the_models_context_is_refused_with_400() -> None:
    admission = admission_of(BlockAllocator(4, 4), max_waiting=8, context_length=8)
    admission.offer(sequence("fits", prompt_length=5, max_tokens=3))
    with pytest.raises(RefusedError, match="make 9 tokens; the model reads 8") as refusal:
        admission.offer(sequence("too long", prompt_length=5, max_tokens=4))
    assert refusal.value.code == 400


def test_a_full_line_refuses_with_429() -> None:
    admission = admission_of(BlockAllocator(4, 4), max_waiting=2)
    for name in "ab":
        admission.offer(sequence(name))
    with pytest.raises(RefusedError, match="2 requests are already waiting") as refusal:
        admission.offer(sequence("c"))
    assert refusal.value.code == 429


def test_a_waiting_sequence_can_leave_the_line() -> None:
    admission = admission_of(BlockAllocator(4, 4), max_waiting=8)
    line = [sequence(name) for name in "abc"]
    for one in line:
        admission.offer(one)
    assert admission.remove(line[1])
    assert not admission.remove(line[1])
    assert ids(admission.waiting()) == ["a", "c"]
