"""Ten minutes of requests, disconnects and training: afterwards every KV block is free, and memory is flat.

One node of two stages with the embedded model. Clients ask for prompts and answers of random lengths, half of
them from a few beginnings that the prefix cache knows; four in ten leave before the end. Training goes on all
the while.
"""

import asyncio
import json
import random
import statistics
import time
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks.loaded_cluster import NUM_TOKENS, examples
from lemix.client import ApiClient, ApiError, served_model
from lemix.launcher import LocalCluster
from lemix.open_cluster import open_cluster
from lemix.run_folder import clear
from lemix.status import fetch_status
from lemix.topology import ClusterOptions
from lemix.waiting import AppliedBatches, wait_nodes_ready
from shared import subjects
from shared.bus.nats import NatsBus

DURATION_S = 600.0
NUM_CLIENTS = 12
LEAVING_SHARE = 0.4
LONGEST_STAY_S = 3.0
"""The longest time that a client waits who leaves."""
PROMPT_TOKENS, MAX_TOKENS = (1, 400), (1, 80)
NUM_BEGINNINGS = 6
LOOK_EVERY_S = 5.0
DRAIN_TIMEOUT_S = 60.0


class Clients:
    """They come one after the other, each on its own connection."""

    def __init__(self, api_url: str, model: str, rng: random.Random) -> None:
        self.ends: Counter[str] = Counter()
        self._api_url, self._model, self._rng = api_url, model, rng
        self._beginnings = [self._tokens(PROMPT_TOKENS[1] // 2) for _ in range(NUM_BEGINNINGS)]

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(NUM_TOKENS) for _ in range(count)]

    def _prompt(self) -> list[int]:
        num_tokens = self._rng.randint(*PROMPT_TOKENS)
        if self._rng.random() < 0.5:
            return self._tokens(num_tokens)
        return self._rng.choice(self._beginnings) + self._tokens(num_tokens // 2 or 1)

    async def ask_on(self) -> None:
        """Until it is cancelled."""
        while True:
            leaves = self._rng.random() < LEAVING_SHARE
            stay_s = self._rng.uniform(0, LONGEST_STAY_S) if leaves else DURATION_S
            async with ApiClient(self._api_url, model=self._model) as api:
                try:
                    async with asyncio.timeout(stay_s):
                        await api.complete(
                            self._prompt(), max_tokens=self._rng.randint(*MAX_TOKENS), ignore_eos=True
                        )
                except TimeoutError:
                    self.ends["left"] += 1
                except ApiError as error:
                    self.ends[f"failed: {error}"] += 1
                else:
                    self.ends["answered"] += 1


async def train_on(bus: NatsBus, applied: AppliedBatches) -> None:
    """One batch after the other, until it is cancelled."""
    number = 0
    while True:
        body = {"id": f"soak-{number}", "examples": examples(number)}
        await bus.publish_durable(subjects.BATCHES, json.dumps(body).encode())
        await applied.wait_for([f"soak-{number}"])
        number += 1


def resident_mb(pid: int) -> float:
    """Memory of a process that is its own."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (anonymous,) = [line for line in lines if line.startswith("RssAnon")]
    return int(anonymous.split()[1]) / 1024


async def watch(cluster: LocalCluster, memory_mb: dict[str, list[float]]) -> None:
    """Look at every process's memory, until it is cancelled."""
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        for name, pid in cluster.pids.items():
            memory_mb[name].append(resident_mb(pid))


async def blocks_left(bus: NatsBus) -> int:
    """Blocks in use when nobody asks any more; waits for them to come free."""
    until_s = time.monotonic() + DRAIN_TIMEOUT_S
    while True:
        (node,) = (await fetch_status(bus)).nodes
        used = max(stage.kv_blocks_used for stage in node.stages)
        if not used or time.monotonic() > until_s:
            return used
        await asyncio.sleep(LOOK_EVERY_S)


def growth(memory_mb: list[float]) -> dict[str, float]:
    """The third quarter's median, the last one's, and their ratio: the first half may fill caches."""
    quarter = len(memory_mb) // 4
    third, last = (
        statistics.median(memory_mb[-2 * quarter : -quarter]),
        statistics.median(memory_mb[-quarter:]),
    )
    return {"third_quarter_mb": third, "last_quarter_mb": last, "ratio": last / third}


async def main(work: Path) -> dict[str, Any]:
    options = ClusterOptions(name="soak", runs_dir=work, nodes=1, stages=2)
    clear(options.run_dir)
    memory_mb: defaultdict[str, list[float]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(open_cluster(options))
        bus = await NatsBus.connect(cluster.nats_url, name="bench")
        stack.push_async_callback(bus.close)
        applied = await AppliedBatches.following(bus)
        await wait_nodes_ready(bus, 1)
        clients = Clients(cluster.api_url, await served_model(cluster.api_url), random.Random(0))
        load = (clients.ask_on() for _ in range(NUM_CLIENTS))
        tasks = [
            asyncio.create_task(each) for each in (train_on(bus, applied), watch(cluster, memory_mb), *load)
        ]
        done, _ = await asyncio.wait(tasks, timeout=DURATION_S, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
        return {
            "seconds": DURATION_S,
            "requests": dict(clients.ends),
            "batches_applied": applied.num_batches,
            "blocks_used_at_the_end": await blocks_left(bus),
            "memory": {name: growth(found) for name, found in memory_mb.items()},
        }
