"""A tensor from one process to another on one GPU: by `cuda_ipc`, beside `shm`, which goes through the host.

A transfer is a tensor handed over, taken, and answered by one message, until the consumer's GPU is done.
"""

import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import spread
from lemix.arenas import default_base
from shared.messages.cluster import LinkAnswer, LinkOffer
from shared.tensors.collective import hardware_name
from shared.tensors.cuda_ipc import CudaIpcLink
from shared.tensors.gpu_memory import gpu_named
from shared.tensors.links import IncomingLinks, OutgoingLink, SharedMemoryLink
from shared.tensors.ref import TensorRef

SIZES_BYTES = {"64_kb": 2**16, "1_mb": 2**20, "16_mb": 2**24}
NUM_ROUNDS, NUM_SLOTS = 50, 2
"""Few slots: containers often have 64 MB of shared memory."""
DEADLINE_S = 60.0


def consume(pipe: Connection, device: str) -> None:
    """The second process: accept two links, then take what comes until nothing more does."""
    incoming = IncomingLinks(torch.device(device))
    for _ in range(2):
        pipe.send_bytes(incoming.accept(LinkOffer.unpack(pipe.recv_bytes())).pack())
    while body := pipe.recv_bytes():
        incoming.take(TensorRef.unpack(body))
        torch.cuda.synchronize(device)
        pipe.send_bytes(b".")


def received(pipe: Connection) -> bytes:
    """Raises TimeoutError when the other process does not answer."""
    if not pipe.poll(DEADLINE_S):
        raise TimeoutError("the consumer does not answer")
    return pipe.recv_bytes()


def transfer_ms(pipe: Connection, link: OutgoingLink, tensor: torch.Tensor) -> float:
    start_s = time.perf_counter()
    pipe.send_bytes(link.put(tensor).pack())
    received(pipe)
    return (time.perf_counter() - start_s) * 1e3


def measure(pipe: Connection, folder: Path, device: torch.device) -> dict[str, Any]:
    gpu, room = gpu_named(hardware_name(device), device), {"slot_bytes": max(SIZES_BYTES.values())}
    assert gpu is not None
    links: dict[str, OutgoingLink] = {
        "cuda_ipc": CudaIpcLink(gpu, folder / "ring", num_slots=NUM_SLOTS, **room),
        "shm": SharedMemoryLink(folder / "arena", num_slots=NUM_SLOTS, **room),
    }
    for stage, link in enumerate(links.values()):
        pipe.send_bytes(link.offer(stage, "bench").pack())
        answer = LinkAnswer.unpack(received(pipe))
        assert answer.accepted, answer.reason
        link.connect(answer)
    results = {}
    for name, size_bytes in SIZES_BYTES.items():
        tensor = torch.rand(size_bytes // 4, device=device)
        times_ms: dict[str, list[float]] = {carrier: [] for carrier in links}
        for _ in range(NUM_ROUNDS):
            for carrier, link in links.items():
                times_ms[carrier].append(transfer_ms(pipe, link, tensor))
        results[name] = {carrier: spread(times) for carrier, times in times_ms.items()}
    pipe.send_bytes(b"")
    return {"transfer_ms": results}


async def main(work: Path, device: str) -> AsyncIterator[dict[str, Any]]:
    spawning = multiprocessing.get_context("spawn")
    pipe, far_end = spawning.Pipe()
    process = spawning.Process(target=consume, args=(far_end, device), daemon=True)
    process.start()
    try:
        with tempfile.TemporaryDirectory(dir=default_base()) as folder:
            result = measure(pipe, Path(folder), torch.device(device))
        process.join(DEADLINE_S)
        yield result
    finally:
        process.kill()
