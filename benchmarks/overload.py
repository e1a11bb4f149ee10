"""Five times as many requests as a cluster answers: what refusals cost the gateway, and how soon they come.

Real services on emulated devices. First the most that the cluster answers, by clients that ask again at once;
then requests at five times that rate, each by a client of its own, with an objective for the first token.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from benchmarks.gateway.stages import processor_s
from lemix.bus import open_bus
from lemix.open_cluster import open_cluster
from lemix.run_folder import clear
from lemix.topology import ClusterOptions
from lemix.waiting import wait_nodes_ready

PROFILE = "llama2-13b@a100"
STAGES = 2
PROMPT_TOKENS, MAX_TOKENS = 800, 4
TTFT_S = 1.0
TIMES_CAPACITY = 5.0
CLOSED_CLIENTS, CLOSED_S = 16, 10.0
OPEN_S = 20.0
DEADLINE_S = 60.0


class Asked(NamedTuple):
    """A request and its end."""

    status: int
    seconds: float
    """From the start of its connection to its first token, or to its refusal."""


async def main(work: Path) -> dict[str, Any]:
    options = ClusterOptions(
        name="overload",
        runs_dir=work,
        nodes=1,
        stages=STAGES,
        emulate=PROFILE,
        extra_env={"LEMIX_TTFT_S": str(TTFT_S)},
    )
    clear(options.run_dir)
    async with open_cluster(options) as cluster, open_bus(cluster.nats_url) as bus:
        await wait_nodes_ready(bus, options.nodes)
        gateway_pid = cluster.pids["gateway"]
        async with asyncio.timeout(DEADLINE_S):
            capacity_per_s = await closed_loop(cluster.api_url)
        rate_per_s = TIMES_CAPACITY * capacity_per_s
        before_s = processor_s(gateway_pid)
        async with asyncio.timeout(OPEN_S + DEADLINE_S):
            asked = await open_loop(cluster.api_url, rate_per_s)
        used_s = processor_s(gateway_pid) - before_s
    return {
        "capacity_per_s": capacity_per_s,
        "rate_per_s": rate_per_s,
        **figures(asked),
        "gateway_processor_share": used_s / OPEN_S,
        "gateway_processor_ms_per_request": used_s * 1e3 / len(asked),
    }


def figures(asked: Sequence[Asked]) -> dict[str, Any]:
    """The ends of the requests of the open loop."""
    refused_s = [each.seconds for each in asked if each.status == 429]
    answered_s = [each.seconds for each in asked if each.status == 200]
    return {
        "requests": len(asked),
        "by_status": dict(Counter(str(each.status) for each in asked)),
        "answered_per_s": len(answered_s) / OPEN_S,
        "answered_in_time_per_s": sum(seconds <= TTFT_S for seconds in answered_s) / OPEN_S,
        **{
            f"{name}_p{share}_ms": float(np.percentile(seconds, share)) * 1e3
            for name, seconds in (("refusal", refused_s), ("first_token", answered_s))
            for share in (50, 99)
        },
    }


async def closed_loop(url: str) -> float:
    """Answers per second to clients that ask again at once and are never refused."""
    rng, ends_s = random.Random(0), time.monotonic() + CLOSED_S
    slo = {"lemix": {"slo": {"when_late": "serve_last"}}}

    async def ask_on() -> int:
        num_answered = 0
        while time.monotonic() < ends_s:
            num_answered += (await ask(url, rng, **slo)).status == 200
        return num_answered

    return sum(await asyncio.gather(*(ask_on() for _ in range(CLOSED_CLIENTS)))) / CLOSED_S


async def open_loop(url: str, rate_per_s: float) -> list[Asked]:
    """Requests at random times, whatever becomes of the earlier ones."""
    rng, tasks = random.Random(1), []
    async with asyncio.TaskGroup() as group:
        due_s = time.monotonic()
        ends_s = due_s + OPEN_S
        while (due_s := due_s + rng.expovariate(rate_per_s)) < ends_s:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            tasks.append(group.create_task(ask(url, rng)))
    return [task.result() for task in tasks]


async def ask(url: str, rng: random.Random, **more: object) -> Asked:
    """Ask for a stream with a prompt of random tokens, and read all of the answer."""
    prompt = [rng.randrange(256) for _ in range(PROMPT_TOKENS)]
    asked = {"model": "embedded", "prompt": prompt, "max_tokens": MAX_TOKENS, "stream": True} | more
    body, place = json.dumps(asked).encode(), urlsplit(url)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    began_s = time.monotonic()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    status = int((await reader.readline()).split()[1])
    if status == 200:
        await reader.readuntil(b"data: ")
    told_s = time.monotonic()
    await reader.read()
    writer.close()
    return Asked(status, told_s - began_s)
