"""Tensors between two stages of one process."""

import pytest
import torch
from msgspec import structs

from shared.errors import CarrierError, StaleTensorError
from shared.tensors import local
from shared.tensors.links import IncomingLinks
from shared.tensors.local import LocalLink, LocalTensors
from tests.support.played_cuda import PlayedCuda, PlayedStream

CPU = torch.device("cpu")


def linked() -> tuple[LocalLink, IncomingLinks]:
    tensors = LocalTensors()
    outgoing, incoming = LocalLink(tensors, "place"), IncomingLinks(CPU, tensors)
    answer = incoming.accept(outgoing.offer(0, "instance"))
    assert answer.accepted
    outgoing.connect(answer)
    return outgoing, incoming


def test_the_tensor_itself_is_handed_over_without_its_graph() -> None:
    outgoing, incoming = linked()
    sent = torch.ones(3, requires_grad=True) * 2
    ref = outgoing.put(sent)
    assert (ref.carrier, ref.shape, ref.dtype, ref.size_bytes) == ("local", (3,), "float32", 12)
    taken = incoming.take(ref)
    assert taken.data_ptr() == sent.data_ptr()
    assert not taken.requires_grad


def test_a_tensor_is_taken_once() -> None:
    outgoing, incoming = linked()
    first, second = outgoing.put(torch.zeros(1)), outgoing.put(torch.ones(1))
    assert incoming.take(second).item() == 1
    assert incoming.take(first).item() == 0
    with pytest.raises(StaleTensorError):
        incoming.take(first)


def test_what_is_discarded_or_left_behind_is_gone() -> None:
    outgoing, incoming = linked()
    discarded, left = outgoing.put(torch.zeros(1)), outgoing.put(torch.zeros(1))
    incoming.discard(discarded)
    incoming.discard(discarded)
    outgoing.close()
    for ref in (discarded, left):
        with pytest.raises(StaleTensorError):
            incoming.take(ref)


def test_a_link_made_anew_does_not_hand_out_what_the_old_one_held() -> None:
    tensors = LocalTensors()
    incoming = IncomingLinks(CPU, tensors)
    stale = LocalLink(tensors, "place").put(torch.zeros(1))
    fresh = LocalLink(tensors, "place").put(torch.ones(1))
    with pytest.raises(StaleTensorError):
        incoming.take(stale)
    assert incoming.take(fresh).item() == 1


def test_another_process_cannot_take_a_handle() -> None:
    outgoing, _ = linked()
    offer = outgoing.offer(0, "instance")
    assert not IncomingLinks(CPU).accept(offer).accepted
    with pytest.raises(StaleTensorError):
        IncomingLinks(CPU).take(structs.replace(outgoing.put(torch.ones(1)), place="elsewhere"))


def test_a_consumer_that_takes_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "MAX_UNREAD", 2)
    outgoing, incoming = linked()
    refs = [outgoing.put(torch.ones(1)) for _ in range(2)]
    with pytest.raises(CarrierError, match="2 tensors at place"):
        outgoing.put(torch.ones(1))
    incoming.take(refs[0])
    outgoing.put(torch.ones(1))


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU, and notes which streams use it."""

    is_cuda = True
    used_by: list[PlayedStream] = []  # noqa: RUF012  # shared with its views

    def record_stream(self, s: PlayedStream) -> None:  # type: ignore[override]
        self.used_by.append(s)


def test_a_copy_waits_for_the_stream_that_computes_the_tensor() -> None:
    cuda = PlayedCuda()
    tensors = LocalTensors(cuda)
    tensors.open("place")
    with cuda.stream(cuda.Stream(priority=-1)):
        cuda.launch("iteration", 9.0)
        ref = tensors.put("place", torch.ones(3).as_subclass(OnGpu))
    tensors.take(ref, CPU)
    cuda.launch("copy")
    assert cuda.done_before["copy"] == {"iteration"}
    assert OnGpu.used_by == [cuda.current_stream()], "its memory is not given to others before"
