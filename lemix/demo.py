"""`lemix demo`: one model answers requests while training batches change its weights.

held_out           the loss of held-out text, before and after, through the API
load               requests at Poisson arrivals
publishing         training batches to the durable subject
waiting            until the weights contain them
summary            what all that amounts to
"""

import asyncio
import random
from dataclasses import dataclass, replace

from lemix.bus import open_bus
from lemix.client import ApiClient, served_model
from lemix.demo_data import DemoData
from lemix.demo_view import DemoView
from lemix.held_out import served_loss
from lemix.launcher import LocalCluster
from lemix.load import Outcome, plan_requests, run_requests
from lemix.publishing import publish_batches
from lemix.run_folder import clear
from lemix.summary import ServedLoss, Summary, Training, summarise
from lemix.topology import ClusterOptions
from lemix.waiting import AppliedBatches, wait_nodes_ready
from shared.bus.base import Bus
from shared.clock import Clock

PUBLISHING_SHARE = 0.75
"""Batches are spread over this share of the load, so that training ends about when requests do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """The load of a demo."""

    seconds: float = 60.0
    """How long requests arrive."""
    requests_per_s: float = 2.0
    max_tokens: tuple[int, int] = (16, 48)
    """Each request asks for a number of tokens drawn from this range."""
    seed: int = 0
    """Of the arrival times, the choice of prompts, and the numbers of tokens."""


async def run_demo(
    cluster_options: ClusterOptions, options: DemoOptions, data: DemoData, view: DemoView, clock: Clock
) -> Summary:
    """Start a cluster, load it, train it, measure it, stop it; also write summary.json.

    Raises ConfigurationError, ClusterFailedError, ApiError, or ProgressError when training does not
    come to its end.
    """
    began_s = clock.now_s()
    # A server that was running before may hold the batches of earlier runs.
    settings = {**cluster_options.extra_env, "LEMIX_TRAIN_FROM": "next"}
    cluster_options = replace(cluster_options, extra_env=settings)
    clear(cluster_options.run_dir)
    view.say(f"starting {cluster_options.nodes} nodes x {cluster_options.stages} stages")
    async with LocalCluster(cluster_options, on_event=view.say) as cluster, asyncio.TaskGroup() as group:
        watch = group.create_task(cluster.wait_failed())
        model = await served_model(cluster.api_url)
        view.say(f"{cluster.api_url} serves {model}")
        async with open_bus(cluster.nats_url) as bus, ApiClient(cluster.api_url, model=model) as api:
            summary = await Demo(api, bus, options, data, view, clock).run(cluster_options.nodes)
        watch.cancel()
    summary = summary.model_copy(update={"wall_s": clock.now_s() - began_s})
    (cluster_options.run_dir / "summary.json").write_text(summary.model_dump_json(indent=2) + "\n")
    return summary


class Demo:
    """The measurements on a running cluster."""

    def __init__(
        self, api: ApiClient, bus: Bus, options: DemoOptions, data: DemoData, view: DemoView, clock: Clock
    ) -> None:
        self._api = api
        self._bus = bus
        self._options = options
        self._data = data
        self._view = view
        self._clock = clock

    async def run(self, num_nodes: int) -> Summary:
        """Loss before, load and training together, loss after."""
        await wait_nodes_ready(self._bus, num_nodes)
        applied = await AppliedBatches.following(self._bus)
        began_s = self._clock.now_s()
        before = await self._served_loss("before", num_nodes)
        loaded_s = self._clock.now_s()
        outcomes, applied_s = await self._serve_and_train(applied)
        after = await self._served_loss("after", num_nodes)
        return summarise(
            outcomes,
            training=self._training(applied, applied_s),
            served_loss=ServedLoss(before=before, after=after),
            load_s=max((outcome.ended_s for outcome in outcomes), default=loaded_s) - loaded_s,
            wall_s=self._clock.now_s() - began_s,
        )

    async def _served_loss(self, when: str, num_nodes: int) -> float:
        with self._view.task(f"held-out loss {when}", len(self._data.held_out)) as advance:
            return await served_loss(self._api, self._data.held_out, nodes=num_nodes, on_scored=advance)

    async def _serve_and_train(self, applied: AppliedBatches) -> tuple[list[Outcome], float]:
        """Both at once; returns what became of the requests, and the seconds until the last step."""
        began_s = self._clock.now_s()
        async with asyncio.TaskGroup() as group:
            requests = group.create_task(self._serve())
            group.create_task(self._publish())
            training = group.create_task(self._until_applied(applied))
        return requests.result(), training.result() - began_s

    async def _serve(self) -> list[Outcome]:
        plan = plan_requests(
            self._data.prompts,
            rate_per_s=self._options.requests_per_s,
            duration_s=self._options.seconds,
            max_tokens=self._options.max_tokens,
            rng=random.Random(self._options.seed),
        )
        with self._view.task("requests answered", len(plan)) as advance:
            return await run_requests(self._api, plan, clock=self._clock, on_outcome=lambda _: advance(1))

    async def _publish(self) -> None:
        gap_s = self._options.seconds * PUBLISHING_SHARE / len(self._data.batches)
        with self._view.task("batches published", len(self._data.batches)) as advance:
            async for _ in publish_batches(self._bus, self._data.batches):
                advance(1)
                await asyncio.sleep(gap_s)

    async def _until_applied(self, applied: AppliedBatches) -> float:
        """When the weights contained every batch, by this process's clock."""
        with self._view.task("batches applied", len(self._data.batches)) as advance:
            await applied.wait_for([batch.batch_id for batch in self._data.batches], on_applied=advance)
        return self._clock.now_s()

    def _training(self, applied: AppliedBatches, applied_s: float) -> Training:
        return Training(
            batches_published=len(self._data.batches),
            batches_applied=applied.num_batches,
            optimizer_steps=applied.num_steps,
            tokens_per_s=self._data.num_batch_tokens / applied_s,
        )
