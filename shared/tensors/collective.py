"""Carrier `collective`: a mean over the same stage of several nodes.

NCCL between GPUs; gloo between CPUs, and through host memory where members share a GPU, which NCCL refuses:
one bucket at a time.

torch.distributed's default group is fixed for the life of a process and belongs to all of it. Here a group is
an object: made for a merge (or kept for many), dropped with it, made anew with other members.

The mean of an element is the sum, in the order of the members, of share times value, each operation rounded
to float32. A ring all-reduce too gives all members the same bits, but sums each chunk in another order: the
two copies of a tied embedding, which lie on two stages and so in two groups at different places, would drift
apart with three members and more. Hence two all-to-all exchanges: each member gets its part of all copies,
adds them up in order, and hands the result to all. The traffic is that of a ring:
2 (M - 1) / M of the size for M members, out and in.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from math import fsum, isfinite
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store  # type: ignore[attr-defined]

from shared.errors import CarrierError, PeerLostError
from shared.tensors.rendezvous import meet

BUCKET_BYTES = 8 * 2**20
_ELEMENT_BYTES = 4


class CollectiveGroup:
    """One member's end of a group. All calls block: they are made for a background thread, one at a time."""

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        member: int,
        members: Sequence[int],
        device: torch.device,
        timeout_s: float,
        host: str = "127.0.0.1",
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Meet the other members and connect to them.

        `name` is of this group alone and the same on all members, as are the order of `members` (numbers of
        nodes), `timeout_s` and `bucket_bytes`. `host` is this machine's name or address where the others
        reach it (gloo; NCCL finds its own way, or reads NCCL_SOCKET_IFNAME). `timeout_s` bounds each single
        wait for a peer: here, and for each bucket in `mean_`.
        Raises PeerLostError when a member does not come.
        """
        self._members, self._rank, self._device = tuple(members), members.index(member), device
        own_store = PrefixStore(name, store)
        with self._needing_peers():
            devices = meet(own_store, member, members, tells=hardware_name(device), timeout_s=timeout_s)
            self._mean_device = device if can_use_nccl(devices) else torch.device("cpu")
            place = own_store, self._rank, len(members)
            self._backend: Any = (
                nccl_backend(*place, timeout_s=timeout_s)
                if self._mean_device.type == "cuda"
                else gloo_backend(*place, timeout_s=timeout_s, host=host)
            )
        self._bucket_length = bucket_bytes // _ELEMENT_BYTES
        room = self._bucket_length + len(members)
        self._received, self._result = torch.zeros(2, room, device=self._mean_device)

    def mean_(self, flat: Tensor, weight: float) -> int:
        """Replace `flat` by the mean over all members, weighted by what each gives as `weight`.

        `flat` is [N] float32 in one piece on the group's device, with the same N on all members. A member
        of weight 0 adds nothing, whatever it holds, and gets the mean. Returns the bytes sent.

        Raises CarrierError on all members when their N differ or nobody has any weight: `flat` is untouched.
        Raises PeerLostError when a member is gone or silent: `flat` is spoilt, the group closed. So give
        a copy (FlatTensors), and copy it back only when this returns.
        """
        assert flat.dtype == torch.float32 and flat.is_contiguous(), flat.dtype
        assert weight >= 0 and isfinite(weight), weight
        with self._own_stream():
            share = self._agreed_share(len(flat), weight)
            sent_bytes = 0
            for bucket in torch.split(flat, self._bucket_length):
                there = bucket.to(self._mean_device)  # `bucket` itself where it is there
                sent_bytes += self._mean_bucket(there, share)
                if there is not bucket:
                    bucket.copy_(there)
            return sent_bytes

    def close(self) -> None:
        """Leave the group. A `mean_` that runs in another thread fails at its next bucket."""
        self._backend = None

    def _agreed_share(self, length: int, weight: float) -> float:
        """This member's share of all weights.

        Compares lengths: gloo ends the process when more comes than it expects."""
        own = torch.tensor([weight, length], dtype=torch.float64, device=self._mean_device)
        ours = own.repeat(len(self._members), 1)
        theirs = torch.empty_like(ours)
        self._exchange(theirs, ours)
        weights, lengths = theirs.T.tolist()
        if set(lengths) != {length}:
            raise CarrierError(f"members {list(self._members)} hold {lengths} elements")
        if not any(weights):
            raise CarrierError(f"none of members {list(self._members)} has any weight")
        return weight / fsum(weights)

    def _mean_bucket(self, bucket: Tensor, share: float) -> int:
        """Returns the bytes sent."""
        if share:
            bucket.mul_(share)
        else:
            bucket.zero_()  # NaN times 0 is NaN
        size = len(self._members)
        parts = [len(part) for part in bucket.tensor_split(size)]
        own = parts[self._rank]
        received, result = self._received[: size * own], self._result[: size * own]
        self._exchange(received, bucket, [own] * size, parts)
        total, *others = received.view(size, own)
        for other in others:
            total.add_(other)
        result.view(size, own).copy_(total)
        self._exchange(bucket, result, parts, [own] * size)
        return _ELEMENT_BYTES * (len(bucket) - own + (size - 1) * own)

    def _exchange(
        self, output: Tensor, inputs: Tensor, of_each: Sequence[int] = (), to_each: Sequence[int] = ()
    ) -> None:
        """Send each member its part of `inputs`; `output` holds what each has sent, in order."""
        if self._backend is None:
            raise CarrierError(f"the group of members {list(self._members)} is closed")
        with self._needing_peers():
            self._backend.alltoall_base(output, inputs, of_each, to_each).wait()

    @contextmanager
    def _needing_peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.close()
            others = [one for one in self._members if one != self._members[self._rank]]
            raise PeerLostError(f"lost touch with one of members {others}: {_reason(error)}") from error

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Use an own stream on a GPU: after the compute thread's earlier work, beside its later work."""
        if self._device.type != "cuda":
            yield
            return
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def hardware_name(device: torch.device) -> str:
    """The name of a GPU's hardware, the same in all processes; else `cpu`."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


def can_use_nccl(devices: Sequence[str]) -> bool:
    """Given each member's `hardware_name`: NCCL needs a GPU of its own for each."""
    return "cpu" not in devices and len(set(devices)) == len(devices)


def gloo_backend(store: Store, rank: int, size: int, *, timeout_s: float, host: str) -> ProcessGroupGloo:
    """Connected to all others over the interface that has `host`'s address, with one thread for transfers.

    Raises CarrierError when this machine has no such address, RuntimeError when a peer is not there in time.
    """
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stubs have other names
    try:
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    except RuntimeError as error:
        raise CarrierError(f"{host} is no address of this machine") from error
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 1
    return ProcessGroupGloo(store, rank, size, options)


def nccl_backend(store: Store, rank: int, size: int, *, timeout_s: float) -> Any:
    """Between one GPU of each process; the connection is made at the first exchange."""
    from torch.distributed import ProcessGroupNCCL  # only CUDA builds of torch have it

    # Else `wait` does not wait, and a lost peer ends the process instead of raising.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return ProcessGroupNCCL(store, rank, size, options)


def _reason(error: RuntimeError) -> str:
    """gloo's first sentence without the place in its source."""
    return str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
