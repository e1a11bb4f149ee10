"""A pair's rules for NCCL, with gloo in its place, which pairs tensors of one tag by their order, too."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from shared.tensors.collective import gloo_backend
from shared.tensors.pairs import CONSUMER, PRODUCER, GlooPair, NcclPair, make_pair
from shared.tensors.rendezvous import host_store, join_store, store_address

CPU = torch.device("cpu")
HOST, LONG_S = "127.0.0.1", 60.0

Pairs = tuple[NcclPair, NcclPair]


@pytest.fixture
def pairs() -> Iterator[Pairs]:
    """Producer and consumer."""
    store = host_store(HOST, timeout_s=LONG_S)

    def side(rank: int) -> NcclPair:
        own = join_store(store_address(store), timeout_s=LONG_S)
        asking, carrying = (
            gloo_backend(PrefixStore(name, own), rank, 2, timeout_s=LONG_S, host=HOST)
            for name in ("asking", "carrying")
        )
        return NcclPair(asking, carrying, rank, CPU)

    with ThreadPoolExecutor(2) as threads:
        producer, consumer = threads.map(side, (PRODUCER, CONSUMER))
    yield producer, consumer
    producer.close()
    consumer.close()


def tensor_of(number: int) -> Tensor:
    """Each has a shape of its own: what comes in the wrong order does not fit."""
    return torch.arange(float(number + 1) * 3).view(number + 1, 3)


def test_tensors_are_taken_in_any_order(pairs: Pairs) -> None:
    producer, consumer = pairs
    waits = [producer.send(tensor_of(number), number) for number in range(4)]
    for number in (2, 0, 3, 1):
        sent = tensor_of(number)
        assert torch.equal(consumer.receive(sent.shape, sent.dtype, number), sent)
        waits[number]()  # returns, for it is there


@pytest.mark.parametrize("is_closed_by_consumer", [False, True])
def test_whoever_is_left_learns_of_it(is_closed_by_consumer: bool, pairs: Pairs) -> None:
    producer, consumer = pairs
    wait = producer.send(tensor_of(1), 1)
    (consumer if is_closed_by_consumer else producer).close()
    with pytest.raises(RuntimeError):
        wait()
    with pytest.raises(RuntimeError):
        consumer.receive((2, 3), torch.float32, 1)


def test_who_asks_for_what_never_was_ends_the_connection(pairs: Pairs) -> None:
    producer, consumer = pairs
    wait = producer.send(tensor_of(1), 1)
    with pytest.raises(RuntimeError):
        consumer.receive((2, 3), torch.float32, 99)
    with pytest.raises(RuntimeError):
        wait()


def test_between_processors_it_is_gloo() -> None:
    store = host_store(HOST, timeout_s=LONG_S)

    def side(rank: int) -> object:
        own = join_store(store_address(store), timeout_s=LONG_S)
        return make_pair(own, rank, CPU, host=HOST, timeout_s=LONG_S)

    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(side, (PRODUCER, CONSUMER)))
    assert {type(pair) for pair in made} == {GlooPair}
