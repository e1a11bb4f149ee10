"""A ring in a GPU's memory between two processes: what comes out is what went in, also when one is ahead."""

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from shared.messages.cluster import LinkAnswer, LinkOffer
from shared.tensors.collective import hardware_name
from shared.tensors.cuda_ipc import CudaIpcLink
from shared.tensors.gpu_memory import gpu_named
from shared.tensors.links import IncomingLinks
from shared.tensors.ref import TensorRef

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

DEADLINE_S = 60.0
NUM_TENSORS, NUM_SLOTS, ROWS, HIDDEN = 40, 3, 512, 2048


def sums_of_what_comes(pipe: Connection, device: str) -> None:
    """The consumer's process: takes each tensor, and tells the sum of all when nothing more comes."""
    incoming = IncomingLinks(torch.device(device))
    pipe.send_bytes(incoming.accept(LinkOffer.unpack(pipe.recv_bytes())).pack())
    sums = []
    while body := pipe.recv_bytes():
        sums.append(incoming.take(TensorRef.unpack(body)).double().sum())
    pipe.send([each.item() for each in sums])


@pytest.mark.parametrize(
    "consumer",
    [
        0,
        pytest.param(
            1, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
        ),
    ],
)
def test_tensors_reach_another_process(consumer: int, tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    gpu = gpu_named(hardware_name(device), device)
    assert gpu is not None
    link = CudaIpcLink(gpu, tmp_path / "ring", slot_bytes=4 * ROWS * HIDDEN, num_slots=NUM_SLOTS)
    pipe, far_end = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=sums_of_what_comes, args=(far_end, f"cuda:{consumer}"), daemon=True
    )
    process.start()
    pipe.send_bytes(link.offer(0, "instance").pack())
    assert pipe.poll(DEADLINE_S)
    answer = LinkAnswer.unpack(pipe.recv_bytes())
    assert answer.accepted, answer.reason
    link.connect(answer)
    expected = []
    for number in range(NUM_TENSORS):  # nobody waits for the GPU here
        sent = torch.full((ROWS, HIDDEN), float(number), device=device)
        sent @= torch.eye(HIDDEN, device=device)
        pipe.send_bytes(link.put(sent).pack())
        expected.append(float(number) * ROWS * HIDDEN)
    pipe.send_bytes(b"")
    assert pipe.poll(DEADLINE_S)
    assert pipe.recv() == expected
    process.join(DEADLINE_S)
    assert process.exitcode == 0
