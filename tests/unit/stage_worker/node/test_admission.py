"""Who gets blocks of the KV cache, and when."""

import pytest
from msgspec import structs

from services.stage_worker.node.admission import Admission
from services.stage_worker.node.kv_blocks import KVBlocks
from services.stage_worker.node.sequence import Sequence
from shared.errors import RefusedError
from tests.unit.stage_worker.support import sequence


def admission_of(blocks: KVBlocks, *, max_waiting: int = 8, context_length: int | None = None) -> Admission:
    return Admission(blocks, max_waiting=max_waiting, vocab_size=100, context_length=context_length)


def admit(admission: Admission, *, num_running: int = 0, version: int = 0) -> list[Sequence]:
    return admission.admit(lambda _: version, num_running=num_running)


def ids(sequences: list[Sequence]) -> list[str]:
    return [one.task.task_id for one in sequences]


def test_a_sequence_gets_the_blocks_that_its_prompt_needs() -> None:
    admission = admission_of(KVBlocks(8, 4))
    admission.offer(sequence(prompt_length=6, max_tokens=20))
    (admitted,) = admit(admission)
    assert len(admitted.held.blocks) == 2
    assert len(admission) == 0


def test_a_sequence_waits_until_its_blocks_are_free() -> None:
    blocks = KVBlocks(4, 4)
    admission = admission_of(blocks)
    for number, name in enumerate("ab"):
        admission.offer(sequence(name, prompt_length=10, first=number))
    (first,) = admit(admission)
    assert (first.task.task_id, len(admission)) == ("a", 1)
    assert admit(admission, num_running=1) == []
    blocks.release(first)
    assert ids(admit(admission)) == ["b"]


def test_every_running_sequence_can_still_get_a_block_after_an_admission() -> None:
    admission = admission_of(KVBlocks(5, 4))
    for name in "abc":
        admission.offer(sequence(name))
    assert ids(admit(admission, num_running=1)) == ["a", "b"]
    assert admit(admission, num_running=3) == []
    assert ids(admit(admission, num_running=2)) == ["c"]


def test_nobody_overtakes_the_head_of_the_line() -> None:
    blocks = KVBlocks(4, 4)
    admission = admission_of(blocks)
    taken = sequence(prompt_length=8, first=50)
    blocks.place(taken, 0, reserve=0)
    admission.offer(sequence("large", prompt_length=12))
    admission.offer(sequence("small", prompt_length=1, max_tokens=1))
    assert admit(admission, num_running=1) == []
    blocks.release(taken)
    assert ids(admit(admission)) == ["large"]


def test_who_lost_its_blocks_is_first_in_line_and_gets_blocks_for_all_of_its_tokens() -> None:
    admission = admission_of(KVBlocks(8, 4))
    admission.offer(sequence("new"))
    again = sequence("again", prompt_length=6)
    again.generated = [7, 8, 9]
    admission.put_back(again)
    assert ids(admit(admission)) == ["again", "new"]
    assert len(again.held.blocks) == 3


def test_those_that_begin_alike_wait_for_the_first_and_let_others_pass() -> None:
    blocks = KVBlocks(32, 4)
    admission = admission_of(blocks)
    first, second, third = (sequence(name, prompt_length=10) for name in ("a", "b", "c"))
    other = sequence("other", prompt_length=3)
    for each in (first, second, third, other):
        admission.offer(each)
    assert ids(admit(admission)) == ["a", "other"]
    assert len(admission) == 2
    blocks.computed(first, 4, 0)
    assert admit(admission, num_running=2) == []
    blocks.computed(first, 10, 0)
    assert ids(admit(admission, num_running=2)) == ["b", "c"]
    assert second.held.blocks[:2] == first.held.blocks[:2] == third.held.blocks[:2]
    assert (second.num_cached, second.num_left) == (8, 2)


def test_those_that_wait_for_a_sequence_go_on_without_it_when_it_is_gone() -> None:
    blocks = KVBlocks(32, 4)
    admission = admission_of(blocks)
    first, second, third = (sequence(name, prompt_length=10) for name in ("a", "b", "c"))
    for each in (first, second, third):
        admission.offer(each)
    admit(admission)
    admission.remove(second)
    blocks.release(first)
    assert ids(admit(admission)) == ["c"]
    assert len(admission) == 0


def test_what_can_never_fit_is_refused_with_400() -> None:
    admission = admission_of(KVBlocks(4, 4))
    admission.offer(sequence("fits", prompt_length=10, max_tokens=7))
    with pytest.raises(RefusedError, match="18 tokens of KV cache; a node has 16") as refusal:
        admission.offer(sequence("too large", prompt_length=10, max_tokens=8))
    assert refusal.value.code == 400
    assert ids(admit(admission)) == ["fits"]


def test_an_empty_prompt_is_refused_with_400() -> None:
    with pytest.raises(RefusedError, match="empty") as refusal:
        admission_of(KVBlocks(4, 4)).offer(sequence(prompt_length=0))
    assert refusal.value.code == 400


@pytest.mark.parametrize("token", [-1, 100])
def test_a_token_that_the_model_does_not_know_is_refused_with_400(token: int) -> None:
    strange = sequence()
    strange.task = structs.replace(strange.task, prompt=(1, token))
    with pytest.raises(RefusedError, match="tokens are 0 to 99") as refusal:
        admission_of(KVBlocks(4, 4)).offer(strange)
    assert refusal.value.code == 400


def test_more_than_the_models_context_is_refused_with_400() -> None:
    admission = admission_of(KVBlocks(4, 4), context_length=8)
    admission.offer(sequence("fits", prompt_length=5, max_tokens=3))
    with pytest.raises(RefusedError, match="make 9 tokens; the model reads 8") as refusal:
        admission.offer(sequence("too long", prompt_length=5, max_tokens=4))
    assert refusal.value.code == 400


def test_a_full_line_refuses_with_429() -> None:
    admission = admission_of(KVBlocks(4, 4), max_waiting=2)
    for name in "ab":
        admission.offer(sequence(name))
    with pytest.raises(RefusedError, match="2 requests are already waiting") as refusal:
        admission.offer(sequence("c"))
    assert refusal.value.code == 429


def test_a_waiting_sequence_can_leave_the_line() -> None:
    admission = admission_of(KVBlocks(4, 4))
    line = [sequence(name) for name in "abc"]
    for one in line:
        admission.offer(one)
    admission.remove(line[1])
    admission.remove(line[1])
    assert ids(admit(admission)) == ["a", "c"]
