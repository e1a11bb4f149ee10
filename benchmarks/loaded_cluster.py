"""A cluster that trains while clients ask for completions all the time, and what its clients see."""

import asyncio
import json
import random
import statistics
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lemix.client import ApiClient, ApiError, served_model
from lemix.open_cluster import open_cluster
from lemix.run_folder import clear
from lemix.topology import ClusterOptions
from lemix.waiting import AppliedBatches, wait_nodes_ready
from shared import subjects
from shared.bus.base import Incoming
from shared.bus.nats import NatsBus
from shared.messages.training import ShardSaved, StageReport, VersionsServed

BATCHES_PER_ROUND = 24
NUM_STREAMS = 4
MAX_TOKENS = 48
PROMPT = "The function returns"
NUM_EXAMPLES, EXAMPLE_LENGTH, NUM_TOKENS = 4, 48, 256
SETTINGS = {"LEMIX_CHECKPOINT_EVERY": "1000", "LEMIX_LEARNING_RATE": "1e-7", "LEMIX_GUARD_SAMPLES": "0"}
"""All clusters must go on saying the same: a token without a text would be no event at the client."""


@dataclass
class LoadedCluster:
    """Nodes of two stages with the embedded model."""

    api: ApiClient
    bus: NatsBus
    applied: AppliedBatches
    num_batches: int = 0
    tbt_s: list[float] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)
    """That made a first or a last token."""
    published: set[int] = field(default_factory=set)
    """That a stage 0 has told to serve to new requests."""
    saved: set[int] = field(default_factory=set)
    """Versions that a stage has written for a checkpoint."""
    num_moved: int = 0
    """Requests that ended with another version than they began with."""
    num_requests: int = 0
    num_tokens: int = 0
    errors: list[str] = field(default_factory=list)

    @classmethod
    async def start(
        cls, name: str, work: Path, stack: AsyncExitStack, settings: Mapping[str, str], *, nodes: int = 1
    ) -> Self:
        """Ends with `stack`. `settings`: of every service."""
        options = ClusterOptions(
            name=name, runs_dir=work, nodes=nodes, stages=2, extra_env={**SETTINGS, **settings}
        )
        clear(options.run_dir)
        cluster = await stack.enter_async_context(open_cluster(options))
        model = await served_model(cluster.api_url)
        api = await stack.enter_async_context(ApiClient(cluster.api_url, model=model))
        bus = await NatsBus.connect(cluster.nats_url, name="bench")
        stack.push_async_callback(bus.close)
        loaded = cls(api, bus, await AppliedBatches.following(bus))
        await bus.subscribe(subjects.REPORT.at(), loaded._on_report)
        await wait_nodes_ready(bus, nodes)
        return loaded

    async def round(self, *, counts: bool) -> None:
        """Train on so many batches, and ask for completions all the while; some rounds only warm up."""
        async with asyncio.TaskGroup() as group:
            training = group.create_task(self._train())
            for _ in range(NUM_STREAMS):
                group.create_task(self._ask_until(training, counts=counts))

    def result(self) -> dict[str, Any]:
        """The clients' measurements."""
        percentiles = statistics.quantiles(self.tbt_s, n=100)
        return {
            "requests": self.num_requests,
            "failed": len(self.errors),
            "errors": self.errors[:3],
            "batches": self.num_batches,
            "versions_published": len(self.published),
            "versions_saved": len(self.saved),
            "versions_seen_by_requests": len(self.versions),
            "requests_that_changed_version": self.num_moved,
            "tokens": self.num_tokens,
            "times_between_tokens": len(self.tbt_s),
            "tbt_p50_s": statistics.median(self.tbt_s),
            "tbt_p90_s": percentiles[89],
            "tbt_p99_s": percentiles[98],
            "tbt_max_s": max(self.tbt_s),
        }

    async def _on_report(self, incoming: Incoming[StageReport]) -> None:
        match incoming.message.event:
            case VersionsServed(published=published):
                self.published.add(published)
            case ShardSaved(version=version):
                self.saved.add(version)

    async def _train(self) -> None:
        numbers = range(self.num_batches, self.num_batches + BATCHES_PER_ROUND)
        ids = [f"bench-{number}" for number in numbers]
        for number, batch_id in zip(numbers, ids, strict=True):
            body = {"id": batch_id, "examples": examples(number)}
            await self.bus.publish_durable(subjects.BATCHES, json.dumps(body).encode())
        self.num_batches += BATCHES_PER_ROUND
        await self.applied.wait_for(ids)

    async def _ask_until(self, training: asyncio.Task[None], *, counts: bool) -> None:
        while not training.done():
            try:
                completion = await self.api.complete(PROMPT, max_tokens=MAX_TOKENS)
            except ApiError as error:
                self.errors.append(str(error))
                continue
            if counts:
                self.num_requests += 1
                self.tbt_s += completion.tbt_s
                self.num_tokens += completion.completion_tokens
                self.versions |= set(completion.weights_versions)
                self.num_moved += len(set(completion.weights_versions)) > 1


async def measure_in_turns(clusters: dict[str, LoadedCluster], num_rounds: int) -> dict[str, Any]:
    """Rounds of all clusters in turns; the first one warms up."""
    for number in range(num_rounds + 1):
        for name in list(clusters)[:: 1 if number % 2 else -1]:
            await clusters[name].round(counts=number > 0)
    return {name: cluster.result() for name, cluster in clusters.items()}


def added_at_p99(results: dict[str, Any], name: str, *, to: str) -> float:
    """Time that `name` adds to the 99th percentile between tokens, in medians of `to`."""
    plain = results[to]
    return float((results[name]["tbt_p99_s"] - plain["tbt_p99_s"]) / plain["tbt_p50_s"])


def examples(number: int) -> list[dict[str, Any]]:
    """The examples of batch `number`: random tokens."""
    rng = random.Random(number)
    return [
        {"token_ids": [rng.randrange(NUM_TOKENS) for _ in range(EXAMPLE_LENGTH)]} for _ in range(NUM_EXAMPLES)
    ]
