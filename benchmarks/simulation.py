"""How fast a simulated cluster runs: stage events per second of wall time, and what more nodes cost.

A stage event is the start or the end of one op on one stage. Every node gets the same load: requests with
short answers at random times, and a training batch for every ten of them.
"""

import asyncio
import json
import random
import resource
import time
from pathlib import Path
from typing import Any

from benchmarks.report import spread
from lemix.simulation.cluster import SimulationOptions, running_cluster
from lemix.simulation.devices import Devices
from lemix.simulation.loop import run_virtual
from services.gateway.cluster_client import ClusterClient
from services.gateway.sent_sequence import SequenceSpec
from shared.messages.inference import Sampling
from shared.profiles.times import Work
from shared.subjects import BATCHES

NUM_ROUNDS = 5
POLICIES = ("round_robin", "lemix")
NODES = (4, 16, 64, 256, 1000)
REQUESTS_PER_NODE = 100
REQUESTS_PER_S = 10.0
"""On each node."""
PROMPT_TOKENS, MAX_TOKENS = 256, 4
REQUESTS_PER_BATCH = 10
EXAMPLES, EXAMPLE_TOKENS = 4, 128


class CountingTimes:
    """A stage of constant speed, about that of a 7B model's half on one big GPU, which counts its ops."""

    def __init__(self, *, is_last: bool) -> None:
        self.num_ops = 0
        self._is_last = is_last

    def iteration_s(self, work: Work) -> float:
        self.num_ops += 1
        return 5e-3 + 3e-5 * work.num_tokens

    def forward_s(self, work: Work) -> float:
        self.num_ops += 1
        return 5e-3 + 3e-5 * work.num_tokens

    def backward_s(self, work: Work) -> float:
        self.num_ops += not self._is_last  # there it is part of the forward
        return 1e-2 + 6e-5 * work.num_tokens

    def step_s(self) -> float:
        self.num_ops += 1
        return 1e-2


async def main(work: Path) -> dict[str, Any]:
    """Measure in a thread, because this thread's event loop is a real one."""
    return await asyncio.to_thread(_measure_all)


def _measure_all() -> dict[str, Any]:
    measure(1, stages=2, requests_per_node=10)  # loads what is loaded at first use
    rounds = [
        measure(4, stages=2, requests_per_node=500, policy=policy)
        for _ in range(NUM_ROUNDS)
        for policy in POLICIES
    ]
    return {
        "events_per_s": {policy: _spread(rounds, policy, "events_per_s") for policy in POLICIES},
        "events_per_cpu_s": {policy: _spread(rounds, policy, "events_per_cpu_s") for policy in POLICIES},
        "rounds": rounds,
        "by_nodes": [measure(nodes, stages=4, requests_per_node=REQUESTS_PER_NODE) for nodes in NODES],
    }


def _spread(rounds: list[dict[str, Any]], policy: str, what: str) -> dict[str, float]:
    return spread([each[what] for each in rounds if each["policy"] == policy])


def measure(
    nodes: int, *, stages: int, requests_per_node: int, policy: str = "round_robin"
) -> dict[str, Any]:
    """One run. Peak memory is that of the process so far: measure small clusters first."""
    times = tuple(CountingTimes(is_last=stage == stages - 1) for stage in range(stages))
    devices = Devices(times=times, vocab_size=32000, context_length=4096, kv_tokens=1 << 18)
    options = SimulationOptions(nodes=nodes, stages=stages, profile="constant", policy=policy)
    begun_s, cpu_s = time.perf_counter(), time.process_time()
    virtual_s = run_virtual(_run(options, devices, num_requests=nodes * requests_per_node))
    wall_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - cpu_s
    num_events = 2 * sum(stage.num_ops for stage in times)
    return {
        "policy": policy,
        "nodes": nodes,
        "stages": stages,
        "requests": nodes * requests_per_node,
        "virtual_s": virtual_s,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "events": num_events,
        "events_per_s": num_events / wall_s,
        "events_per_cpu_s": num_events / cpu_s,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


async def _run(options: SimulationOptions, devices: Devices, *, num_requests: int) -> float:
    rng = random.Random(options.seed)
    async with running_cluster(options, devices=devices) as cluster:
        world = cluster.world
        gateway = ClusterClient(
            bus=world.bus,
            clock=world.clock,
            ids=world.ids,
            telemetry=world.telemetry,
            request_timeout_s=600.0,
        )
        async with gateway.running(), asyncio.TaskGroup() as group:
            for number in range(num_requests):
                await asyncio.sleep(rng.expovariate(REQUESTS_PER_S * options.nodes))
                group.create_task(_request(gateway, rng))
                if number % REQUESTS_PER_BATCH == 0:
                    await world.bus.publish_durable(BATCHES, _batch(number))
        return world.clock.now_s()


async def _request(gateway: ClusterClient, rng: random.Random) -> None:
    prompt = tuple(rng.randrange(32000) for _ in range(PROMPT_TOKENS))
    session = gateway.submit([SequenceSpec(prompt=prompt, sampling=Sampling(max_tokens=MAX_TOKENS))])
    while not any(arrival.result.finish for arrival in await session.next()):
        pass
    session.close()


def _batch(number: int) -> bytes:
    examples = [{"token_ids": list(range(EXAMPLE_TOKENS))}] * EXAMPLES
    return json.dumps({"id": f"batch-{number}", "examples": examples}).encode()
