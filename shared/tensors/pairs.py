"""How tensors go from a producer to its consumer once the two have met: by gloo, or by NCCL between GPUs."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from shared.tensors.collective import can_use_nccl, gloo_backend, hardware_name, nccl_backend
from shared.tensors.rendezvous import meet

PRODUCER, CONSUMER = 0, 1
_MEMBERS = (PRODUCER, CONSUMER)
_UNREAD_FOR = timedelta(days=1)
"""A tensor may wait in its consumer's queue; gloo would end the connection at a timeout."""
_AT_ONCE = timedelta(milliseconds=1)
_NEVER_SENT = 2**31 - 1
_CPU = torch.device("cpu")


class Pair(Protocol):
    """One side of a connection of two. Each method raises RuntimeError when the connection is lost."""

    def send(self, tensor: Tensor, number: int) -> Callable[[], Any]:
        """Send a tensor when the consumer asks for its number; the result waits until it has it."""
        ...

    def receive(self, shape: Sequence[int], dtype: torch.dtype, number: int) -> Tensor:
        """Ask for a tensor and wait for it; where it then lies is the pair's choice."""
        ...

    def close(self) -> None:
        """End the connection: whoever waits on the other side learns of it."""
        ...


def make_pair(store: Store, rank: int, device: torch.device, *, host: str, timeout_s: float) -> Pair:
    """Meet the other side in `store`: NCCL where both have a GPU of their own, else gloo.

    Raises PeerLostError or RuntimeError when the other does not come, CarrierError for a wrong `host`.
    """
    devices = meet(store, rank, _MEMBERS, tells=hardware_name(device), timeout_s=timeout_s)
    gloo = gloo_backend(store, rank, len(_MEMBERS), timeout_s=timeout_s, host=host)
    if not can_use_nccl(devices):
        return GlooPair(gloo, rank)
    nccl = nccl_backend(PrefixStore("nccl", store), rank, len(_MEMBERS), timeout_s=timeout_s)
    return NcclPair(gloo, nccl, rank, device)


class GlooPair:
    """Through host memory; a tensor's number is gloo's tag, so that they are taken in any order."""

    def __init__(self, group: Any, rank: int) -> None:
        self._group = group
        self._other = 1 - rank

    def send(self, tensor: Tensor, number: int) -> Callable[[], Any]:
        sent = tensor.detach().to("cpu").contiguous()
        work = self._group.send([sent.view(-1)], CONSUMER, number)

        def wait() -> Any:
            return work.wait(_UNREAD_FOR), sent  # which lives as long as gloo may read it

        return wait

    def receive(self, shape: Sequence[int], dtype: torch.dtype, number: int) -> Tensor:
        received = torch.empty(shape, dtype=dtype)
        self._group.recv([received.view(-1)], PRODUCER, number).wait()
        return received

    def close(self) -> None:
        _end(self._group, self._other)


@dataclass(frozen=True, slots=True)
class _Unasked:
    """A tensor that the consumer has not asked for."""

    tensor: Tensor
    ready: Any
    """The point in the stream's work where it is computed; None on a CPU."""
    sent: "Future[None]"


class NcclPair:
    """From GPU to GPU. NCCL knows no tags: it pairs what is sent with what is received by order alone.

    So the consumer asks by gloo for the number that it takes, and the producer says yes and sends just that
    one. No GPU waits in a receive that nobody serves, and tensors are taken in any order.

    Its rules are tested on a CPU, with gloo in NCCL's place; between two cards it has not run yet.
    """

    def __init__(self, asking: Any, carrying: Any, rank: int, device: torch.device) -> None:
        self._asking = asking
        self._carrying = carrying
        self._other = 1 - rank
        self._device = device
        self._unasked: dict[int, _Unasked] = {}
        if rank == PRODUCER:
            Thread(target=self._answer, name="answering", daemon=True).start()

    def send(self, tensor: Tensor, number: int) -> Callable[[], Any]:
        is_gpu = self._device.type == "cuda"
        ready = torch.cuda.current_stream(self._device).record_event() if is_gpu else None
        unasked = self._unasked[number] = _Unasked(tensor.detach().contiguous(), ready, Future())
        return lambda: unasked.sent.result(_UNREAD_FOR.total_seconds())

    def receive(self, shape: Sequence[int], dtype: torch.dtype, number: int) -> Tensor:
        received, asked = torch.empty(shape, dtype=dtype, device=self._device), torch.tensor([number])
        self._asking.send([asked], PRODUCER, 0).wait()
        self._asking.recv([asked], PRODUCER, 0).wait()
        self._carrying.recv([received.view(-1)], PRODUCER, 0).wait()
        return received

    def close(self) -> None:
        _end(self._asking, self._other)
        self._carrying.abort()

    def _answer(self) -> None:
        """Send what the consumer asks for, in a thread of its own, until the connection ends."""
        asked, stream = torch.empty(1, dtype=torch.int64), self._own_stream()
        try:
            while True:
                self._asking.recv([asked], CONSUMER, 0).wait(_UNREAD_FOR)
                unasked = self._unasked.pop(int(asked))
                self._asking.send([asked], CONSUMER, 0).wait()
                with _beside(stream, unasked.ready):
                    self._carrying.send([unasked.tensor.view(-1)], CONSUMER, 0).wait()
                unasked.sent.set_result(None)
        except (RuntimeError, KeyError) as error:  # KeyError: it asks for what it has had, or never was
            self.close()
            for unasked in self._unasked.values():
                unasked.sent.set_exception(RuntimeError(str(error)))

    def _own_stream(self) -> Any:
        """Work that is given to the GPU later must not hold up what is sent now."""
        if self._device.type != "cuda":
            return None
        torch.cuda.set_device(self._device)  # of this thread
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]


def _beside(stream: Any, ready: Any) -> AbstractContextManager[Any]:
    if stream is None:
        return nullcontext()
    stream.wait_event(ready)
    return torch.cuda.stream(stream)


def _end(group: Any, other: int) -> None:
    """gloo ends a connection when a wait ends without success."""
    with suppress(RuntimeError):
        group.recv([torch.empty(1)], other, _NEVER_SENT).wait(_AT_ONCE)
    group.abort()
