"""One stage-to-stage hop: message out to message in, with a 64 KB activation; beside bare nats-py.

Two processes send a message to and fro, the activation by `shm` handle, in turn over a server with locks and
over one without. Then two stages of one process do, by `local` handle. A hop is half of the round trip, by
the clock of one process.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import nats
import torch
import uvloop
from nats.aio.client import Client

from benchmarks.report import spread
from lemix.arenas import default_base
from lemix.bus import open_bus
from lemix.nats_server import NatsServer
from lemix.nats_users import make_users
from shared import subjects
from shared.bus.base import Bus, Incoming
from shared.bus.nats import NatsBus
from shared.bus.near import NearBus
from shared.bus.permissions import Role
from shared.messages.cluster import LinkOffer
from shared.messages.inference import Iteration, IterationForward
from shared.tensors.links import IncomingLinks, OutgoingLink, SharedMemoryLink
from shared.tensors.local import LocalLink, LocalTensors

ACTIVATION_SHAPE = (64, 256)  # 64 KB in float32
NUM_ROUNDS, NUM_PER_ROUND, PACE_S = 5, 400, 0.002
DEVICE = torch.device("cpu")


def iteration(num_sequences: int) -> Iteration:
    """Pieces of prompts, as many rows together as an activation has."""
    return Iteration(
        number=700,
        sequences=tuple(range(300, 300 + num_sequences)),
        starts=(128,) * num_sequences,
        counts=(ACTIVATION_SHAPE[0] // num_sequences,) * num_sequences,
        produces=(True,) * num_sequences,
    )


MESSAGES = {"one_sequence": iteration(1), "eight_sequences": iteration(8)}


class Side:
    """One of the two stages: sends activations to `other`, takes them from it."""

    def __init__(self, bus: Bus, own: int, other: int, link: OutgoingLink, incoming: IncomingLinks) -> None:
        torch.set_num_threads(1)  # as in stage workers
        self._bus, self._own, self._other = bus, own, other
        self._incoming = incoming
        self.link = link

    async def start(self, on_arrival: Callable[[Iteration], Awaitable[None]]) -> None:
        async def handler(incoming: Incoming[IterationForward]) -> None:
            self._incoming.take(incoming.message.hidden)
            await on_arrival(incoming.message.iteration)

        async def accept(incoming: Incoming[LinkOffer]) -> Any:
            return self._incoming.accept(incoming.message)

        await self._bus.subscribe(subjects.ITERATION.at(node=0, stage=self._own), handler)
        await self._bus.respond(subjects.LINK.at(node=0, stage=self._own), accept)

    async def connect(self) -> None:
        target = subjects.LINK.at(node=0, stage=self._other)
        self.link.connect(await self._bus.request(target, self.link.offer(self._own, "bench"), timeout_s=5))

    async def send(self, iteration: Iteration, activation: torch.Tensor) -> None:
        forward = IterationForward(iteration=iteration, hidden=self.link.put(activation))
        await self._bus.publish(subjects.ITERATION.at(node=0, stage=self._other), forward)


def shared_side(bus: Bus, own: int, other: int, folder: Path) -> Side:
    """A stage whose neighbour is in another process."""
    size_bytes = 4 * ACTIVATION_SHAPE[0] * ACTIVATION_SHAPE[1]
    link = SharedMemoryLink(folder / f"{own}.arena", slot_bytes=size_bytes, num_slots=4)
    return Side(bus, own, other, link, IncomingLinks(DEVICE))


def local_sides(bus: Bus) -> tuple[Side, Side]:
    """Two stages of one process."""
    tensors = LocalTensors()
    one, other = (
        Side(bus, own, 1 - own, LocalLink(tensors, f"of {own}"), IncomingLinks(DEVICE, tensors))
        for own in (0, 1)
    )
    return one, other


@asynccontextmanager
async def shared_sides(urls: Mapping[str, str], own: int, folder: Path) -> AsyncIterator[dict[str, Side]]:
    """A side at each server: `open` and `locked`."""
    users = {"open": None, "locked": folder / "users"}
    async with AsyncExitStack() as stack:
        sides = {}
        for name, url in urls.items():
            bus = await stack.enter_async_context(open_bus(url, users[name], Role.STAGE))
            (folder / name).mkdir(exist_ok=True)
            sides[name] = shared_side(bus, own, 1 - own, folder / name)
        yield sides


async def echo(urls: Mapping[str, str], folder: Path) -> None:
    """The second process: sends back what comes, until its stdin closes; also echoes bare messages."""
    async with shared_sides(urls, 1, folder) as sides:
        await _echo(sides, await nats.connect(urls["open"]))


async def _echo(sides: Mapping[str, Side], bare: Client) -> None:
    activation = torch.ones(ACTIVATION_SHAPE)

    async def back(message: Any) -> None:
        await bare.publish("bare.back", message.data)

    await bare.subscribe("bare.out", cb=back)
    await bare.flush()
    for side in sides.values():
        await side.start(partial(side.send, activation=activation))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    for side in sides.values():
        await side.connect()
    print("connected", flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def half_round_trips_ms(send: Callable[[], Awaitable[None]], arrived: asyncio.Event) -> float:
    """Median over one round of paced messages."""
    times = []
    for _ in range(NUM_PER_ROUND):
        arrived.clear()
        start_s = time.perf_counter()
        await send()
        await arrived.wait()
        times.append((time.perf_counter() - start_s) / 2 * 1e3)
        await asyncio.sleep(PACE_S)
    return spread(times)["median"]


async def measure(
    urls: Mapping[str, str], folder: Path, echoing: asyncio.subprocess.Process
) -> dict[str, Any]:
    async with shared_sides(urls, 0, folder) as sides:
        return await _measure(urls["open"], sides, echoing)


async def _measure(
    url: str, sides: Mapping[str, Side], echoing: asyncio.subprocess.Process
) -> dict[str, Any]:
    assert echoing.stdin is not None and echoing.stdout is not None
    bare, arrived, activation = await nats.connect(url), asyncio.Event(), torch.ones(ACTIVATION_SHAPE)
    near = NearBus(await NatsBus.connect(url, name="near"))
    one, two = local_sides(near)

    async def note(iteration: Iteration) -> None:
        arrived.set()

    async def note_bare(message: Any) -> None:
        arrived.set()

    await bare.subscribe("bare.back", cb=note_bare)
    await echoing.stdout.readline()
    for side in sides.values():
        await side.start(note)
        await side.connect()
    echoing.stdin.write(b"\n")
    await echoing.stdout.readline()
    hops = {server: defaultdict[str, list[float]](list) for server in sides}
    near_hops, bare_hops = defaultdict[str, list[float]](list), list[float]()
    await start_local(one, two, note, activation)
    for number in range(NUM_ROUNDS):
        for name, message in MESSAGES.items():
            for server in sorted(sides, reverse=bool(number % 2)):
                send = partial(sides[server].send, message, activation)
                hops[server][name].append(await half_round_trips_ms(send, arrived))
            near_hops[name].append(await half_round_trips_ms(partial(one.send, message, activation), arrived))
        bare_hops.append(await half_round_trips_ms(lambda: bare.publish("bare.out", bytes(100)), arrived))
    for each in (bare, near):
        await each.close()
    return {
        "hop_ms": {name: spread(values) for name, values in hops["open"].items()},
        "hop_with_locks_ms": {name: spread(values) for name, values in hops["locked"].items()},
        "hop_with_locks_to_without": {
            name: spread([locked / plain for locked, plain in zip(hops["locked"][name], values, strict=True)])
            for name, values in hops["open"].items()
        },
        "hop_within_a_worker_ms": {name: spread(values) for name, values in near_hops.items()},
        "bare_nats_py_hop_ms": spread(bare_hops),
    }


async def start_local(
    one: Side, two: Side, on_arrival: Callable[[Iteration], Awaitable[None]], activation: torch.Tensor
) -> None:
    await one.start(on_arrival)
    await two.start(lambda iteration: two.send(iteration, activation))
    await one.connect()
    await two.connect()


async def main(work: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=default_base()) as folder:
        users = make_users(Path(folder) / "users")
        async with (
            NatsServer(Path(folder) / "nats") as plain,
            NatsServer(Path(folder) / "locked-nats", config=users) as locked,
        ):
            urls = {"open": plain.url, "locked": locked.url}
            echoing = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "benchmarks.hop", json.dumps(urls), folder),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            try:
                return await measure(urls, Path(folder), echoing)
            finally:
                echoing.kill()
                await echoing.wait()


if __name__ == "__main__":
    uvloop.run(echo(json.loads(sys.argv[1]), Path(sys.argv[2])))
