"""Inline tensors, and how two stages choose their carrier."""

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from shared.errors import CarrierError, StaleTensorError
from shared.messages.cluster import LinkAnswer
from shared.tensors import inline
from shared.tensors.links import IncomingLinks, SharedMemoryLink
from shared.tensors.ref import INLINE_LIMIT_BYTES, TensorRef

CPU = torch.device("cpu")


def link(folder: Path, name: str = "arena", *, num_slots: int = 2) -> SharedMemoryLink:
    return SharedMemoryLink(folder / name, slot_bytes=2 * INLINE_LIMIT_BYTES, num_slots=num_slots)


def meet(outgoing: SharedMemoryLink, incoming: IncomingLinks, *, stage: int = 0) -> LinkAnswer:
    answer = incoming.accept(outgoing.offer(stage, "instance"))
    outgoing.connect(answer)
    return answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
def test_inline_tensors_survive_the_wire(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = (torch.rand(shape) * 10).to(dtype)
    ref = TensorRef.unpack(inline.put(sent).pack())
    assert ref.size_bytes == sent.numel() * sent.element_size() == len(ref.data)
    taken = inline.take(ref)
    assert taken.dtype == sent.dtype
    assert torch.equal(taken, sent)
    taken.fill_(1)  # private and writable


def test_inline_tensors_need_not_be_contiguous() -> None:
    sent = torch.arange(12.0).view(3, 4).t().requires_grad_()
    assert torch.equal(inline.take(inline.put(sent)), sent)


def test_stages_of_one_host_share_memory_and_leave_no_file(tmp_path: Path) -> None:
    outgoing, incoming = link(tmp_path), IncomingLinks(CPU)
    assert meet(outgoing, incoming).accepted
    assert list(tmp_path.iterdir()) == []
    ref = outgoing.put(torch.arange(5))
    assert (ref.carrier, ref.data) == ("shm", b"")
    assert incoming.take(ref).tolist() == [0, 1, 2, 3, 4]


def test_a_consumer_that_cannot_open_the_arena_gets_tensors_inline(tmp_path: Path) -> None:
    outgoing, incoming = link(tmp_path), IncomingLinks(CPU)
    offer = structs.replace(outgoing.offer(0, "instance"), place=str(tmp_path / "elsewhere"))
    answer = incoming.accept(offer)
    assert not answer.accepted
    assert "elsewhere" in answer.reason
    outgoing.connect(answer)
    assert list(tmp_path.iterdir()) == []
    ref = outgoing.put(torch.arange(5))
    assert ref.carrier == "inline"
    assert incoming.take(ref).tolist() == [0, 1, 2, 3, 4]


def test_what_is_too_large_to_go_inline_is_told(tmp_path: Path) -> None:
    outgoing = link(tmp_path)
    outgoing.connect(LinkAnswer(accepted=False))
    outgoing.put(torch.zeros(INLINE_LIMIT_BYTES, dtype=torch.uint8))
    with pytest.raises(CarrierError, match="must share LEMIX_SHM_DIR"):
        outgoing.put(torch.zeros(INLINE_LIMIT_BYTES + 1, dtype=torch.uint8))


def test_an_offer_that_nobody_answered_leaves_no_file(tmp_path: Path) -> None:
    link(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_new_arena_of_the_same_stage_replaces_the_old_one(tmp_path: Path) -> None:
    old, new, incoming = link(tmp_path, "old"), link(tmp_path, "new"), IncomingLinks(CPU)
    meet(old, incoming)
    late = old.put(torch.tensor([1]))
    meet(new, incoming)
    with pytest.raises(StaleTensorError, match="no link"):
        incoming.take(late)
    assert incoming.take(new.put(torch.tensor([2]))).item() == 2


def test_arenas_of_two_stages_stand_side_by_side(tmp_path: Path) -> None:
    one, other, incoming = link(tmp_path, "one"), link(tmp_path, "other"), IncomingLinks(CPU)
    meet(one, incoming, stage=0)
    meet(other, incoming, stage=2)
    refs = one.put(torch.tensor([1])), other.put(torch.tensor([2]))
    assert [incoming.take(ref).item() for ref in refs] == [1, 2]


def test_discarding_frees_a_slot_and_never_fails(tmp_path: Path) -> None:
    outgoing, incoming = link(tmp_path, num_slots=1), IncomingLinks(CPU)
    meet(outgoing, incoming)
    ref = outgoing.put(torch.tensor([1]))
    for _ in range(2):
        incoming.discard(ref)
    incoming.discard(inline.put(torch.tensor([1])))
    incoming.discard(structs.replace(ref, place="nowhere"))
    assert incoming.take(outgoing.put(torch.tensor([2]))).item() == 2


@pytest.mark.parametrize(
    "change",
    [{"slot": 99}, {"size_bytes": 48}, {"shape": (6,)}, {"shape": (-5, -1)}, {"dtype": "float32"}],
)
def test_a_reference_that_contradicts_itself_is_told(change: dict[str, Any], tmp_path: Path) -> None:
    outgoing, incoming = link(tmp_path), IncomingLinks(CPU)
    meet(outgoing, incoming)
    sent = torch.arange(5)
    for ref in (outgoing.put(sent), inline.put(sent)):
        bad = structs.replace(ref, **change)
        if bad.carrier == "inline" and "slot" in change:
            continue
        with pytest.raises(CarrierError):
            incoming.take(bad)
        incoming.discard(bad)
        assert torch.equal(incoming.take(ref), sent)


def test_an_inline_tensor_must_have_all_its_bytes() -> None:
    with pytest.raises(CarrierError, match="0 bytes came of 40"):
        inline.take(structs.replace(inline.put(torch.arange(5)), data=b""))
