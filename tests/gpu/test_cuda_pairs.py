"""Tensors from one GPU to another by NCCL, as between two hosts."""

import pytest
import torch

from shared.tensors.links import IncomingLinks
from shared.tensors.pairs import NcclPair
from shared.tensors.point_to_point import CollectiveLink

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]

HOST, TIMEOUT_S = "127.0.0.1", 60.0


def test_they_are_taken_in_any_order() -> None:
    here, there = (torch.device("cuda", number) for number in range(2))
    outgoing = CollectiveLink("link", device=here, host=HOST, num_unread=4, timeout_s=TIMEOUT_S)
    incoming = IncomingLinks(there, host=HOST, timeout_s=TIMEOUT_S)
    answer = incoming.accept(outgoing.offer(0, "instance"))
    assert answer.accepted, answer.reason
    outgoing.connect(answer)
    sent = [torch.full((number + 1, 1000), float(number), device=here) for number in range(4)]
    refs = [outgoing.put(tensor) for tensor in sent]
    for number in (2, 0, 3, 1):
        taken = incoming.take(refs[number])
        assert taken.device == there
        assert torch.equal(taken.cpu(), sent[number].cpu())
    assert outgoing._connection is not None
    assert isinstance(outgoing._connection.pair(), NcclPair)
    outgoing.close()
    incoming.close()
