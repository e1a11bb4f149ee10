"""Tensors between two stages over gloo: each side as in a process of its own, with threads of its own."""

import gc
from collections.abc import Iterator

import pytest
import torch
from msgspec import structs
from torch import Tensor

from shared.errors import CarrierError, PeerLostError
from shared.messages.cluster import LinkAnswer
from shared.tensors.links import IncomingLinks
from shared.tensors.point_to_point import CollectiveLink

CPU = torch.device("cpu")
HOST, LONG_S, SHORT_S = "127.0.0.1", 60.0, 0.5

Pair = tuple[CollectiveLink, IncomingLinks]


def link(*, num_unread: int = 4, timeout_s: float = LONG_S) -> CollectiveLink:
    return CollectiveLink("link", host=HOST, num_unread=num_unread, timeout_s=timeout_s)


def meet(outgoing: CollectiveLink) -> IncomingLinks:
    incoming = IncomingLinks(CPU, host=HOST, timeout_s=LONG_S)
    answer = incoming.accept(outgoing.offer(0, "instance"))
    assert answer.accepted, answer.reason
    outgoing.connect(answer)
    return incoming


@pytest.fixture
def pair() -> Iterator[Pair]:
    outgoing = link()
    incoming = meet(outgoing)
    yield outgoing, incoming
    outgoing.close()
    incoming.close()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_arrive_as_they_were(dtype: torch.dtype, pair: Pair) -> None:
    outgoing, incoming = pair
    for sent in (random(3, 4, dtype=dtype), random(1000, 300, dtype=dtype).t(), random(1, dtype=dtype)):
        ref = outgoing.put(sent)
        assert (ref.carrier, ref.data) == ("collective", b"")
        taken = incoming.take(ref)
        assert taken.dtype == dtype
        assert torch.equal(taken, sent)


def test_they_are_taken_in_any_order(pair: Pair) -> None:
    outgoing, incoming = pair
    refs = [outgoing.put(torch.full((5,), float(number))) for number in range(4)]
    assert [incoming.take(refs[place])[0].item() for place in (2, 0, 3, 1)] == [2, 0, 3, 1]


def test_room_comes_free_when_a_tensor_is_taken_or_discarded() -> None:
    outgoing = link(num_unread=2, timeout_s=SHORT_S)
    incoming = meet(outgoing)
    first, second = outgoing.put(random(3)), outgoing.put(random(3))
    with pytest.raises(CarrierError, match="still unread"):
        outgoing.put(random(3))
    incoming.take(second)
    incoming.discard(first)
    outgoing._timeout_s = LONG_S  # what was taken is known a moment later
    refs = [outgoing.put(random(3)) for _ in range(2)]
    assert [torch.equal(incoming.take(ref), random(3)) for ref in refs] == [True, True]
    outgoing.close()
    incoming.close()


def test_a_reference_that_contradicts_itself_is_not_received(pair: Pair) -> None:
    outgoing, incoming = pair
    ref = outgoing.put(random(3))
    with pytest.raises(CarrierError, match="has not 12 bytes"):
        incoming.take(structs.replace(ref, shape=(4,)))
    assert torch.equal(incoming.take(ref), random(3))


def test_a_producer_that_cannot_be_reached_is_refused() -> None:
    outgoing = link()
    offer = outgoing.offer(0, "instance")
    outgoing.close()
    del outgoing
    gc.collect()
    answer = IncomingLinks(CPU).accept(offer)
    assert not answer.accepted
    assert "no rendezvous at 127.0.0.1" in answer.reason


def test_without_an_answer_nothing_is_sent() -> None:
    outgoing = link()
    outgoing.connect(LinkAnswer(accepted=False))
    with pytest.raises(CarrierError, match="nobody has accepted"):
        outgoing.put(random(3))
    outgoing.close()


def test_whoever_is_left_learns_of_it(pair: Pair) -> None:
    outgoing, incoming = pair
    taken, left = outgoing.put(random(3)), outgoing.put(random(3))
    incoming.take(taken)
    outgoing.close()
    with pytest.raises(PeerLostError):
        incoming.take(structs.replace(left, generation=99))
    with pytest.raises(PeerLostError):
        incoming.take(left)
