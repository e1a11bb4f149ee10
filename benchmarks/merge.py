"""The mean of two replicas' weights between two processes, against what gloo itself moves in the same run.

Both processes do the same things in the same order; the first one's clock counts. Each has one compute
thread, as stage workers have. Traffic is what one member sends, and gets as much of.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from benchmarks.report import spread
from shared.tensors.collective import CollectiveGroup, gloo_backend
from shared.tensors.flat import FlatTensors
from shared.tensors.rendezvous import host_store, join_store, store_address

HOST, TIMEOUT_S = "127.0.0.1", 60.0
CPU = torch.device("cpu")
SIZES = {"10M": 10, "50M": 50, "200M": 200}
"""Millions of parameters, about: of the embedded model and `small`, one between, and `big`."""
NUM_ROUNDS = {"10M": 9, "50M": 5, "200M": 3}
CARRIERS = ("all_reduce", "exchange", "one_way")


def parameters(num_millions: int) -> dict[str, Tensor]:
    """Shapes like a transformer's: matrices of 2^20 elements and vectors, with about that many elements."""
    matrices = {f"{number}.weight": torch.empty(1024, 1024, device="meta") for number in range(num_millions)}
    return matrices | {f"{number}.norm": torch.empty(1024, device="meta") for number in range(num_millions)}


class Member:
    """One of the two, with its weights, the copy that is merged, and bare gloo beside it."""

    def __init__(self, store: Store, rank: int) -> None:
        torch.set_num_threads(1)
        self._rank, self._other = rank, 1 - rank
        self._group = CollectiveGroup(
            store, "merge", member=rank, members=(0, 1), device=CPU, timeout_s=TIMEOUT_S, host=HOST
        )
        self._gloo: Any = gloo_backend(PrefixStore("bare", store), rank, 2, timeout_s=TIMEOUT_S, host=HOST)

    def measure(self) -> dict[str, Any]:
        return {name: self._measure_size(parameters(size), NUM_ROUNDS[name]) for name, size in SIZES.items()}

    def _measure_size(self, like: dict[str, Tensor], num_rounds: int) -> dict[str, Any]:
        weights, copy = FlatTensors(like, CPU), FlatTensors(like, CPU)
        weights.flat.fill_(1.0 + 2 * self._rank)
        steps: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: self._gloo.allreduce([copy.flat]).wait(),
            "exchange": lambda: self._exchange(copy.flat, weights.flat),
            "one_way": lambda: self._one_way(copy.flat),
            "copy_in": lambda: copy.copy_from(weights.views),
            "mean": lambda: self._group.mean_(copy.flat, 1.0),
            "copy_out": lambda: copy.copy_to(weights.views),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for round_number in range(num_rounds + 1):
            for name, step in steps.items():
                seconds = self._timed(step)
                if round_number > 0:
                    times[name].append(seconds)
            weights.flat.fill_(1.0 + 2 * self._rank)
        copy.copy_from(weights.views)
        sent_bytes = self._group.mean_(copy.flat, 1.0)
        assert copy.flat.eq(2.0).all(), "this is not the mean"
        return summary(times, sent_bytes, num_parameters=len(copy.flat))

    def _timed(self, step: Callable[[], object]) -> float:
        """Seconds until both are done."""
        self._gloo.barrier().wait()
        start_s = time.perf_counter()
        step()
        self._gloo.barrier().wait()
        return time.perf_counter() - start_s

    def _exchange(self, outgoing: Tensor, incoming: Tensor) -> None:
        sent = self._gloo.send([outgoing], self._other, self._rank)
        self._gloo.recv([incoming], self._other, self._other).wait()
        sent.wait()

    def _one_way(self, flat: Tensor) -> None:
        work = self._gloo.send([flat], 1, 2) if self._rank == 0 else self._gloo.recv([flat], 0, 2)
        work.wait()


def summary(times: dict[str, list[float]], sent_bytes: int, *, num_parameters: int) -> dict[str, Any]:
    """Seconds, and speeds by median: what one member sends in a second."""
    medians = {name: spread(values)["median"] for name, values in times.items()}
    rates = {name: sent_bytes / medians[name] for name in (*CARRIERS, "mean")}
    return {
        "parameters": num_parameters,
        "sent_bytes_per_member": sent_bytes,
        "seconds": {name: spread(values) for name, values in times.items()},
        "bytes_per_s": rates,
        "ratio_of_medians": {f"mean_to_{name}": rates["mean"] / rates[name] for name in CARRIERS},
    }


async def main(work: Path) -> dict[str, Any]:
    store = host_store(HOST, timeout_s=TIMEOUT_S)
    second = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.merge", store_address(store)
    )
    try:
        return await asyncio.to_thread(lambda: Member(store, 0).measure())
    finally:
        second.kill()
        await second.wait()


if __name__ == "__main__":
    Member(join_store(sys.argv[1], timeout_s=TIMEOUT_S), 1).measure()
