"""The ring in a GPU's memory, with a GPU that is played, and producer and consumer in one process."""

from pathlib import Path

import pytest
import torch
from msgspec import structs

from shared.errors import CarrierError, StaleTensorError
from shared.messages.cluster import LinkAnswer, LinkOffer
from shared.tensors.cuda_ipc import CudaIpcLink
from shared.tensors.gpu_memory import gpu_named
from shared.tensors.links import IncomingLinks
from tests.support.played_gpu import PlayedGpu

CPU = torch.device("cpu")


def link(gpu: PlayedGpu, folder: Path, *, slot_bytes: int = 256, num_slots: int = 2) -> CudaIpcLink:
    return CudaIpcLink(gpu, folder / "ring", slot_bytes=slot_bytes, num_slots=num_slots)


def meet(outgoing: CudaIpcLink, gpu: PlayedGpu) -> IncomingLinks:
    """The offer goes over the wire."""
    incoming = IncomingLinks(CPU, find_gpu=gpu.find)
    answer = incoming.accept(LinkOffer.unpack(outgoing.offer(0, "instance").pack()))
    assert answer.accepted, answer.reason
    outgoing.connect(answer)
    return incoming


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_tensor_comes_out_as_it_went_in(dtype: torch.dtype, tmp_path: Path) -> None:
    gpu = PlayedGpu()
    outgoing = link(gpu, tmp_path)
    incoming = meet(outgoing, gpu)
    assert list(tmp_path.iterdir()) == []
    for number in range(5):
        sent = (torch.arange(12).view(3, 4).t() + number).to(dtype)
        ref = outgoing.put(sent)
        assert (ref.carrier, ref.data) == ("cuda_ipc", b"")
        taken = incoming.take(ref)
        assert taken.dtype == dtype
        assert torch.equal(taken, sent)


def test_a_slot_is_read_after_it_is_written_and_written_again_after_it_is_read(tmp_path: Path) -> None:
    gpu = PlayedGpu()
    outgoing = link(gpu, tmp_path, num_slots=2)
    incoming = meet(outgoing, gpu)
    first, second = (outgoing.put(torch.tensor([value])) for value in (1, 2))
    incoming.take(second)
    outgoing.put(torch.tensor([3]))
    written, read = (("event 0", "event 1"), ("event 2", "event 3"))
    assert gpu.happened == [
        *(f"wait {read[0]}", f"wait {written[0]}", f"record {written[0]}"),
        *(f"wait {read[1]}", f"wait {written[1]}", f"record {written[1]}"),
        *(f"wait {written[1]}", f"record {read[1]}"),
        *(f"wait {read[1]}", f"wait {written[1]}", f"record {written[1]}"),
    ]
    with pytest.raises(StaleTensorError):
        incoming.take(second)
    assert incoming.take(first).item() == 1


def test_a_discarded_tensor_leaves_a_free_slot(tmp_path: Path) -> None:
    gpu = PlayedGpu()
    outgoing = link(gpu, tmp_path, num_slots=1)
    incoming = meet(outgoing, gpu)
    incoming.discard(outgoing.put(torch.tensor([1])))
    assert incoming.take(outgoing.put(torch.tensor([2]))).item() == 2


def test_who_does_not_see_the_gpu_refuses(tmp_path: Path) -> None:
    offer = link(PlayedGpu("GPU-0"), tmp_path).offer(0, "instance")
    answer = IncomingLinks(CPU, find_gpu=PlayedGpu("GPU-1").find).accept(offer)
    assert (answer.accepted, answer.reason) == (False, "this stage, on cpu, does not see GPU 'GPU-0'")
    assert gpu_named("GPU-0", CPU) is None


@pytest.mark.parametrize("fault", ["memory", "events", "size", "file", "ring"])
def test_what_contradicts_itself_is_refused(fault: str, tmp_path: Path) -> None:
    gpu = PlayedGpu()
    offer = link(gpu, tmp_path).offer(0, "instance")
    assert offer.ring is not None
    changed = {
        "memory": structs.replace(offer, ring=structs.replace(offer.ring, memory=b"another")),
        "events": structs.replace(offer, ring=structs.replace(offer.ring, read=offer.ring.read[:1])),
        "size": structs.replace(offer, slot_bytes=2 * offer.slot_bytes),
        "file": structs.replace(offer, place=str(tmp_path / "elsewhere")),
        "ring": structs.replace(offer, ring=None),
    }[fault]
    answer = IncomingLinks(CPU, find_gpu=lambda name, own: gpu).accept(changed)
    assert not answer.accepted
    assert answer.reason


def test_nothing_goes_without_an_answer_and_no_file_is_left(tmp_path: Path) -> None:
    outgoing = link(PlayedGpu(), tmp_path)
    with pytest.raises(CarrierError, match="nobody has accepted"):
        outgoing.put(torch.tensor([1]))
    outgoing.connect(LinkAnswer(accepted=False))
    assert list(tmp_path.iterdir()) == []
