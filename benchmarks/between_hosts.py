"""Activations from one host to another by the `collective` carrier, beside a raw TCP connection.

Two network namespaces, joined by a pair of virtual interfaces, stand for the hosts: `ip` needs root for them.
A transfer is a tensor out and an answer of one byte back over TCP, both ways. The carrier makes a new tensor
each time, as in a stage; the raw one has its place already.
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from msgspec import msgpack

from benchmarks.report import spread
from shared.messages.cluster import LinkAnswer, LinkOffer
from shared.tensors.point_to_point import CollectiveLink, CollectiveReader
from shared.tensors.ref import TensorRef

HERE, THERE = "10.213.47.1", "10.213.47.2"
SIZES_BYTES = (2**20, 16 * 2**20)
NUM_ROUNDS = 40
TIMEOUT_S = 30.0
DONE = b"."


class Wire:
    """A TCP connection for messages, answers and raw bytes."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(TIMEOUT_S)
        self._connection = connection

    def send(self, body: bytes | memoryview) -> None:
        self._connection.sendall(body)

    def receive_into(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += self._connection.recv_into(view[done:])

    def send_message(self, message: LinkOffer | TensorRef) -> None:
        body = message.pack()
        self.send(len(body).to_bytes(4, "little") + body)

    def receive(self, size_bytes: int) -> bytes:
        body = bytearray(size_bytes)
        self.receive_into(memoryview(body))
        return bytes(body)

    def receive_message(self) -> bytes:
        return self.receive(int.from_bytes(self.receive(4), "little"))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    view: Any = tensor.numpy()
    return memoryview(view).cast("B")


def produce() -> None:
    """Send every size in turns by both ways; prints gigabytes a second."""
    torch.set_num_threads(1)
    listening = socket.create_server((HERE, 0))
    print(listening.getsockname()[1], flush=True)
    wire = Wire(listening.accept()[0])
    link = CollectiveLink("bench", host=HERE, num_unread=4, timeout_s=TIMEOUT_S)
    wire.send_message(link.offer(0, "bench"))
    wire.receive(len(DONE))
    link.connect(LinkAnswer(accepted=True))
    rates: dict[str, dict[str, list[float]]] = {}
    for size_bytes in SIZES_BYTES:
        tensor = torch.rand(size_bytes // 4)
        ways: dict[str, Callable[[], None]] = {
            "collective": lambda tensor=tensor: wire.send_message(link.put(tensor)),  # type: ignore[misc]
            "raw_tcp": lambda tensor=tensor: wire.send(as_bytes(tensor)),  # type: ignore[misc]
        }
        rates[f"{size_bytes >> 20}_mb"] = {name: [] for name in ways}
        for _ in range(NUM_ROUNDS):
            for name, send in ways.items():
                start_s = time.perf_counter()
                send()
                wire.receive(len(DONE))
                elapsed_s = time.perf_counter() - start_s
                rates[f"{size_bytes >> 20}_mb"][name].append(size_bytes / elapsed_s / 1e9)
    print(msgpack.encode(rates).hex(), flush=True)
    link.close()


def consume(port: int) -> None:
    torch.set_num_threads(1)
    wire = Wire(socket.create_connection((HERE, port)))
    offer = LinkOffer.unpack(wire.receive_message())
    reader = CollectiveReader(offer.place, host=THERE, timeout_s=TIMEOUT_S)
    wire.send(DONE)
    for size_bytes in SIZES_BYTES:
        raw = torch.empty(size_bytes // 4)
        for _ in range(NUM_ROUNDS):
            taken = reader.take(TensorRef.unpack(wire.receive_message()), torch.device("cpu"))
            wire.send(DONE)
            wire.receive_into(as_bytes(raw))
            wire.send(DONE)
            assert torch.equal(taken, raw), "both ways carry the same numbers"
    reader.close()


async def ip(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec("ip", *arguments)
    assert await process.wait() == 0, arguments


async def make_hosts(one: str, other: str) -> None:
    for name in (one, other):
        await ip("netns", "add", name)
        await ip("-n", name, "link", "set", "lo", "up")
    await ip("link", "add", "veth0", "netns", one, "type", "veth", "peer", "name", "veth0", "netns", other)
    for name, address in ((one, HERE), (other, THERE)):
        await ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
        await ip("-n", name, "link", "set", "veth0", "up")


async def run_in(name: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *("ip", "netns", "exec", name, sys.executable, "-m", "benchmarks.between_hosts", *arguments),
        stdout=asyncio.subprocess.PIPE,
        limit=2**20,
    )


async def main(work: Path) -> dict[str, Any]:
    one, other = (f"lemix-{os.getpid()}-{number}" for number in (1, 2))
    try:
        await make_hosts(one, other)
        producer = await run_in(one)
        assert producer.stdout is not None
        port = (await producer.stdout.readline()).decode().strip()
        consumer = await run_in(other, port)
        rates = msgpack.decode(bytes.fromhex((await producer.stdout.readline()).decode()))
        assert (await producer.wait(), await consumer.wait()) == (0, 0)
    finally:
        for name in (one, other):
            await ip("netns", "del", name)
    return {
        size: {
            "gb_per_s": {name: spread(values) for name, values in ways.items()},
            "ratio_of_medians": spread(ways["collective"])["median"] / spread(ways["raw_tcp"])["median"],
        }
        for size, ways in rates.items()
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        consume(int(sys.argv[1]))
    else:
        produce()
