"""Carrier `collective`: from one stage to another that shares no memory with it, as on another host.

The producer serves a store, where both meet and make a gloo group of two in the background. The message names
the tensor; the consumer then receives it under its number. Between GPUs it goes through host memory.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from threading import Semaphore
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from shared.errors import CarrierError, PeerLostError
from shared.messages.cluster import LinkAnswer, LinkOffer, LinkPurpose
from shared.tensors.collective import gloo_backend
from shared.tensors.inline import check_size, dtype_name, dtype_of
from shared.tensors.ref import TensorRef
from shared.tensors.rendezvous import host_store, join_store, store_address

CARRIER = "collective"
_PRODUCER, _CONSUMER, _SIZE = 0, 1, 2
REACH_TIMEOUT_S = 3.0
_UNREAD_FOR = timedelta(days=1)
"""A tensor may wait in its consumer's queue; gloo would end the connection at a timeout."""
_AT_ONCE = timedelta(milliseconds=1)


class CollectiveLink:
    """An `OutgoingLink` over gloo."""

    def __init__(self, name: str, *, host: str, num_unread: int, timeout_s: float) -> None:
        """`host`: this machine's name or address where the consumer reaches it. Raises CarrierError.

        `num_unread`: tensors that may wait to be taken. `timeout_s`: longest wait for the consumer.
        """
        self._host = host
        self._timeout_s = timeout_s
        self._store = host_store(host, timeout_s=timeout_s)
        self._place = f"{store_address(self._store)}/{name}"
        self._room = Semaphore(num_unread)
        self._numbers = itertools.count(1)
        self._connection: _Connection | None = None
        self._unread: dict[int, Any] = {}
        """gloo's sends that have not ended, by the number of their tensor."""
        self._sending = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sending")

    def offer(self, stage: int, instance: str, purpose: LinkPurpose = "activations") -> LinkOffer:
        return LinkOffer(stage=stage, instance=instance, purpose=purpose, carrier=CARRIER, place=self._place)

    def connect(self, answer: LinkAnswer) -> None:
        """Meet the consumer in the background, if it has agreed to."""
        if answer.accepted:
            name = self._place.partition("/")[2]
            self._connection = _Connection(
                self._store, name, _PRODUCER, host=self._host, timeout_s=self._timeout_s
            )

    def put(self, tensor: Tensor) -> TensorRef:
        """Send a tensor as soon as the consumer asks for it.

        Raises CarrierError when too many are unread, PeerLostError when the consumer is gone.
        """
        if self._connection is None:
            raise CarrierError(f"nobody has accepted {self._place}")
        group = self._connection.group()
        if not self._room.acquire(timeout=self._timeout_s):
            raise CarrierError(f"all tensors at {self._place} still unread after {self._timeout_s:g} s")
        number, sent = next(self._numbers), tensor.detach().to("cpu").contiguous()
        work = self._connection.run(lambda: group.send([sent.view(-1)], _CONSUMER, number))
        self._unread[number] = work
        self._sending.submit(self._until_taken, number, work, sent)
        return TensorRef(
            carrier=CARRIER,
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor),
            size_bytes=tensor.numel() * tensor.element_size(),
            place=self._place,
            generation=number,
        )

    def _until_taken(self, number: int, work: Any, sent: Tensor) -> None:
        """Hold `sent` until gloo has read it. When the connection is lost, the next `put` says so."""
        assert self._connection is not None
        try:
            self._connection.run(lambda: work.wait(_UNREAD_FOR))
        finally:
            self._unread.pop(number, None)
            self._room.release()

    @property
    def is_lost(self) -> bool:
        """Known when the connection ends under an unread tensor, or at the next `put`."""
        return self._connection is not None and self._connection.is_lost

    def close(self) -> None:
        """Leave; what nobody has taken is gone, and whoever asks for it learns so."""
        self._sending.shutdown(wait=False, cancel_futures=True)
        for work in list(self._unread.values()):
            with suppress(RuntimeError):  # gloo ends a connection when a wait ends without success
                work.wait(_AT_ONCE)
        self._unread.clear()
        if self._connection is not None:
            self._connection.close()


class CollectiveReader:
    """The consumer's side."""

    def __init__(self, place: str, *, host: str, timeout_s: float) -> None:
        """Find the producer of `place`, and meet it in the background; `host` is this machine's own address.

        Raises PeerLostError when it cannot be reached.
        """
        address, _, name = place.partition("/")
        store = join_store(address, timeout_s=REACH_TIMEOUT_S)
        self._connection = _Connection(store, name, _CONSUMER, host=host, timeout_s=timeout_s)

    def take(self, ref: TensorRef, device: torch.device) -> Tensor:
        """Raises PeerLostError when the producer is gone, CarrierError when `ref` contradicts itself."""
        check_size(ref)
        group, received = self._connection.group(), torch.empty(ref.shape, dtype=dtype_of(ref))
        self._connection.run(lambda: group.recv([received.view(-1)], _PRODUCER, ref.generation).wait())
        return received.to(device)

    def discard(self, ref: TensorRef) -> None:
        """The producer waits until somebody takes it."""
        self.take(ref, torch.device("cpu"))

    def close(self) -> None:
        self._connection.close()


class _Connection:
    """One side of a group of two, made in a thread of its own: both sides must come."""

    def __init__(self, store: Store, name: str, rank: int, *, host: str, timeout_s: float) -> None:
        def make() -> Any:  # the stubs lack point to point
            return gloo_backend(PrefixStore(name, store), rank, _SIZE, timeout_s=timeout_s, host=host)

        self._name = name
        self._timeout_s = timeout_s
        self._why_lost = ""
        """Not the error itself, whose traceback would keep the group and its sockets alive."""
        meeting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="meeting")
        self._group: Future[Any] = meeting.submit(make)
        meeting.shutdown(wait=False)

    def group(self) -> Any:
        """The group, when both have come. Raises PeerLostError."""
        if self._why_lost:
            raise self._lost(self._why_lost)
        return self.run(lambda: self._group.result(self._timeout_s))

    @property
    def is_lost(self) -> bool:
        """Whether it was lost, or the two never met."""
        return bool(self._why_lost) or (self._group.done() and self._group.exception() is not None)

    def run(self, work: Callable[[], Any]) -> Any:
        """Have gloo do something. Raises PeerLostError, from then on at every call of `group`."""
        try:
            return work()
        except TimeoutError as error:
            raise self._lost(str(error)) from error
        except RuntimeError as error:
            self._why_lost = str(error)
            raise self._lost(self._why_lost) from error

    def close(self) -> None:
        """End all that waits for the other side, and let go of the group: then its sockets close."""
        self._why_lost = "closed"
        group, self._group = self._group, Future()
        group.add_done_callback(_abort)

    def _lost(self, why: str) -> PeerLostError:
        return PeerLostError(f"{self._name}: lost touch with the other stage: {why}")


def _abort(made: "Future[Any]") -> None:
    if made.exception() is None:
        made.result().abort()
