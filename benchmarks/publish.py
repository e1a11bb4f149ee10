"""What publishing a new weights version costs the requests that run: time between tokens, under training.

Three clusters of one node of two stages serve and train the embedded model, in turns, with the same load:
`withheld` serves its first version for ever (a guard whose evaluation never comes), `pinned` publishes every
version, and `latest` takes each stage's newest weights from one iteration to the next.
"""

import asyncio
import json
import random
import statistics
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lemix.client import ApiClient, ApiError, served_model
from lemix.launcher import LocalCluster
from lemix.run_folder import clear
from lemix.status import fetch_weights
from lemix.steps import StepCounter, wait_nodes_ready
from lemix.topology import ClusterOptions
from shared import subjects
from shared.bus.base import Incoming
from shared.bus.nats import NatsBus
from shared.messages.training import StageReport, VersionsServed

NUM_ROUNDS = 10
BATCHES_PER_ROUND = 24
"""Of which each is a version."""
NUM_STREAMS = 4
MAX_TOKENS = 48
PROMPT = "The function returns"
NUM_EXAMPLES, EXAMPLE_LENGTH, NUM_TOKENS = 4, 48, 256
LEARNING_RATE = "1e-7"
"""All sides must go on saying the same: a token without a text would be no event at the client."""
NEVER = str(1 << 30)
KINDS = {
    "withheld": {"LEMIX_EVALUATE_EVERY": NEVER},
    "pinned": {"LEMIX_WEIGHTS_CONSISTENCY": "pinned"},
    "latest": {},
}


@dataclass
class Side:
    """One of the clusters, and what was measured on it."""

    api: ApiClient
    bus: NatsBus
    counter: StepCounter
    num_batches: int = 0
    tbt_s: list[float] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)
    """That made a first or a last token."""
    published: set[int] = field(default_factory=set)
    """That stage 0 has told to serve to new requests."""
    num_moved: int = 0
    """Requests that ended with another version than they began with."""
    num_requests: int = 0
    num_tokens: int = 0
    errors: list[str] = field(default_factory=list)

    @classmethod
    async def start(cls, kind: str, work: Path, stack: AsyncExitStack) -> Self:
        settings = {"LEMIX_CHECKPOINT_EVERY": "1000", "LEMIX_LEARNING_RATE": LEARNING_RATE, **KINDS[kind]}
        options = ClusterOptions(name=f"publish-{kind}", runs_dir=work, nodes=1, stages=2)
        clear(options.run_dir)
        options.run_dir.mkdir(parents=True, exist_ok=True)
        if kind == "withheld":
            settings["LEMIX_HELD_OUT"] = str(_held_out(options.run_dir))
        options = ClusterOptions(name=options.name, runs_dir=work, nodes=1, stages=2, extra_env=settings)
        cluster = await stack.enter_async_context(LocalCluster(options))
        model = await served_model(cluster.api_url)
        api = await stack.enter_async_context(ApiClient(cluster.api_url, model=model))
        bus = await NatsBus.connect(cluster.nats_url, name="bench")
        stack.push_async_callback(bus.close)
        side = cls(api, bus, StepCounter(bus, await wait_nodes_ready(bus, 1)))
        await bus.subscribe(subjects.REPORT.at(), side._on_report)
        return side

    async def _on_report(self, incoming: Incoming[StageReport]) -> None:
        if isinstance(incoming.message.event, VersionsServed):
            self.published.add(incoming.message.event.published)

    async def round(self, *, counts: bool) -> None:
        """Train on so many batches, and ask for completions all the while."""
        async with asyncio.TaskGroup() as group:
            training = group.create_task(self._train())
            for _ in range(NUM_STREAMS):
                group.create_task(self._ask_until(training, counts=counts))

    async def _train(self) -> None:
        for number in range(self.num_batches, self.num_batches + BATCHES_PER_ROUND):
            body = {"id": f"bench-{number}", "examples": _examples(number)}
            await self.bus.publish_durable(subjects.BATCHES, json.dumps(body).encode())
        self.num_batches += BATCHES_PER_ROUND
        await self.counter.wait_for(self.num_batches, on_steps=lambda steps: None)

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

    async def result(self) -> dict[str, Any]:
        (weights,) = (await fetch_weights(self.bus)).nodes
        percentiles = statistics.quantiles(self.tbt_s, n=100)
        return {
            "requests": self.num_requests,
            "failed": len(self.errors),
            "errors": self.errors[:3],
            "steps": self.num_batches,
            "newest_version": weights.version,
            "published_version": weights.published,
            "versions_published": len(self.published),
            "versions_seen_by_requests": len(self.versions),
            "requests_that_changed_version": self.num_moved,
            "tokens": self.num_tokens,
            "times_between_tokens": len(self.tbt_s),
            "tbt_p50_s": statistics.median(self.tbt_s),
            "tbt_p90_s": percentiles[89],
            "tbt_p99_s": percentiles[98],
            "tbt_max_s": max(self.tbt_s),
        }


def _examples(number: int) -> list[dict[str, Any]]:
    rng = random.Random(number)
    return [
        {"token_ids": [rng.randrange(NUM_TOKENS) for _ in range(EXAMPLE_LENGTH)]} for _ in range(NUM_EXAMPLES)
    ]


def _held_out(folder: Path) -> Path:
    path = folder / "held_out.jsonl"
    path.write_text("\n".join(map(json.dumps, _examples(-1))))
    return path


async def main(work: Path) -> dict[str, Any]:
    """Rounds of all sides in turns; the first one warms up."""
    began_s = time.monotonic()
    async with AsyncExitStack() as stack:
        sides = {kind: await Side.start(kind, work, stack) for kind in KINDS}
        for number in range(NUM_ROUNDS + 1):
            for kind in list(KINDS)[:: 1 if number % 2 else -1]:
                await sides[kind].round(counts=number > 0)
        results = {kind: await side.result() for kind, side in sides.items()}
    iteration_s = results["withheld"]["tbt_p50_s"]
    added = {
        kind: (results[kind]["tbt_p99_s"] - results["withheld"]["tbt_p99_s"]) / iteration_s
        for kind in ("pinned", "latest")
    }
    return {
        **results,
        "added_at_p99_in_median_tbt": added,
        "wall_s": time.monotonic() - began_s,
    }
