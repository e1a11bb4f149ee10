"""Carrier `collective`: from one stage to another that shares no memory with it, as on another host.

The producer serves a store, where both meet and make a pair in the background: NCCL where both have a GPU of
their own, else gloo (pairs.py). The message names the tensor; the consumer then receives it under its number.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from shared.errors import CarrierError, PeerLostError
from shared.messages.cluster import LinkAnswer, LinkOffer, LinkPurpose
from shared.tensors.inline import check_size, dtype_name, dtype_of
from shared.tensors.pairs import CONSUMER, PRODUCER, Pair, make_pair
from shared.tensors.ref import TensorRef
from shared.tensors.rendezvous import host_store, join_store, store_address

CARRIER = "collective"
REACH_TIMEOUT_S = 3.0
CPU = torch.device("cpu")

T = TypeVar("T")


class CollectiveLink:
    """An `OutgoingLink` over a network."""

    def __init__(
        self, name: str, *, device: torch.device = CPU, host: str, num_unread: int, timeout_s: float
    ) -> None:
        """`host`: this machine's name or address where the consumer reaches it. Raises CarrierError.

        `device`: where tensors come from. `num_unread`: how many may wait to be taken. `timeout_s`: longest
        wait for the consumer.
        """
        self._device = device
        self._host = host
        self._timeout_s = timeout_s
        self._store = host_store(host, timeout_s=timeout_s)
        self._place = f"{store_address(self._store)}/{name}"
        self._room = Semaphore(num_unread)
        self._numbers = itertools.count(1)
        self._connection: _Connection | None = None
        self._sending = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sending")

    def offer(self, stage: int, instance: str, purpose: LinkPurpose = "activations") -> LinkOffer:
        return LinkOffer(stage=stage, instance=instance, purpose=purpose, carrier=CARRIER, place=self._place)

    def connect(self, answer: LinkAnswer) -> None:
        """Meet the consumer in the background, if it has agreed to."""
        if answer.accepted:
            name = self._place.partition("/")[2]
            self._connection = _Connection(
                self._store, name, PRODUCER, self._device, host=self._host, timeout_s=self._timeout_s
            )

    def put(self, tensor: Tensor) -> TensorRef:
        """Send a tensor as soon as the consumer asks for it.

        Raises CarrierError when too many are unread, PeerLostError when the consumer is gone.
        """
        if self._connection is None:
            raise CarrierError(f"nobody has accepted {self._place}")
        pair = self._connection.pair()
        if not self._room.acquire(timeout=self._timeout_s):
            raise CarrierError(f"all tensors at {self._place} still unread after {self._timeout_s:g} s")
        number = next(self._numbers)
        wait = self._connection.run(lambda: pair.send(tensor, number))
        self._sending.submit(self._until_taken, wait)
        return TensorRef(
            carrier=CARRIER,
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor),
            size_bytes=tensor.numel() * tensor.element_size(),
            place=self._place,
            generation=number,
        )

    def take_back(self, ref: TensorRef) -> None:
        """Nothing can be done: it is being sent, and keeps its room until the link is made anew."""

    def _until_taken(self, wait: Callable[[], Any]) -> None:
        """Its room is free again then. When the connection is lost, the next `put` says so."""
        assert self._connection is not None
        try:
            self._connection.run(wait)
        finally:
            self._room.release()

    @property
    def is_lost(self) -> bool:
        """Known when the connection ends under an unread tensor, or at the next `put`."""
        return self._connection is not None and self._connection.is_lost

    def close(self) -> None:
        """Leave; what nobody has taken is gone, and whoever asks for it learns so."""
        self._sending.shutdown(wait=False, cancel_futures=True)
        if self._connection is not None:
            self._connection.close()


class CollectiveReader:
    """The consumer's side."""

    def __init__(self, place: str, *, device: torch.device = CPU, host: str, timeout_s: float) -> None:
        """Find the producer of `place`, and meet it in the background; `host` is this machine's own address.

        `device`: where tensors are wanted. Raises PeerLostError when the producer cannot be reached.
        """
        address, _, name = place.partition("/")
        store = join_store(address, timeout_s=REACH_TIMEOUT_S)
        self._connection = _Connection(store, name, CONSUMER, device, host=host, timeout_s=timeout_s)

    def take(self, ref: TensorRef, device: torch.device) -> Tensor:
        """Raises PeerLostError when the producer is gone, CarrierError when `ref` contradicts itself."""
        check_size(ref)
        pair = self._connection.pair()
        received = self._connection.run(lambda: pair.receive(ref.shape, dtype_of(ref), ref.generation))
        return received.to(device)

    def discard(self, ref: TensorRef) -> None:
        """The producer waits until somebody takes it."""
        self.take(ref, CPU)

    def close(self) -> None:
        self._connection.close()


class _Connection:
    """A pair, made in a thread of its own: both sides must come."""

    def __init__(
        self, store: Store, name: str, rank: int, device: torch.device, *, host: str, timeout_s: float
    ) -> None:
        def make() -> Pair:
            return make_pair(PrefixStore(name, store), rank, device, host=host, timeout_s=timeout_s)

        self._name = name
        self._timeout_s = timeout_s
        self._why_lost = ""
        """Not the error itself, whose traceback would keep the pair and its sockets alive."""
        meeting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="meeting")
        self._pair: Future[Pair] = meeting.submit(make)
        meeting.shutdown(wait=False)

    def pair(self) -> Pair:
        """The pair, when both have come. Raises PeerLostError."""
        if self._why_lost:
            raise self._lost(self._why_lost)
        return self.run(lambda: self._pair.result(self._timeout_s))

    @property
    def is_lost(self) -> bool:
        """Whether it was lost, or the two never met."""
        return bool(self._why_lost) or (self._pair.done() and self._pair.exception() is not None)

    def run(self, work: Callable[[], T]) -> T:
        """Do something over the connection. Raises PeerLostError, from then on at every call of `pair`."""
        try:
            return work()
        except TimeoutError as error:
            raise self._lost(str(error)) from error
        except RuntimeError as error:
            self._why_lost = str(error)
            raise self._lost(self._why_lost) from error

    def close(self) -> None:
        """End all that waits for the other side, and let go of the pair: then its sockets close."""
        self._why_lost = "closed"
        pair, self._pair = self._pair, Future()
        pair.add_done_callback(_close)

    def _lost(self, why: str) -> PeerLostError:
        return PeerLostError(f"{self._name}: lost touch with the other stage: {why}")


def _close(made: "Future[Pair]") -> None:
    if made.exception() is None:
        made.result().close()
