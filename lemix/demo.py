"""`lemix demo`: one model answers requests while training batches change its weights.

held_out           the loss of held-out text, before and after, through the API
load               requests at Poisson arrivals
publishing         training batches to the durable subject
waiting            until the weights contain them
summary            the numbers of a run
demo_figure        the picture of a run
"""

import asyncio
import random
from dataclasses import dataclass, replace

from lemix.bus import open_bus
from lemix.client import ApiClient, served_model
from lemix.demo_data import DemoData
from lemix.demo_figure import draw_demo
from lemix.demo_record import DemoRecord, LossPoint
from lemix.demo_view import DemoView
from lemix.held_out import served_loss
from lemix.launcher import LocalCluster
from lemix.load import plan_requests, run_requests
from lemix.publishing import publish_batches
from lemix.run_folder import clear
from lemix.summary import ServedLoss, Summary, Training, summarise
from lemix.topology import ClusterOptions
from lemix.waiting import AppliedBatches, wait_nodes_ready
from shared.bus.base import Bus
from shared.bus.permissions import Role
from shared.clock import Clock

PUBLISHING_SHARE = 0.75
"""Batches are spread over this share of the load, so that training ends about when requests do."""
PROBED_LINES = 6
"""Held-out lines behind each point of the loss curve; few, because they are requests too."""
PROBE_EVERY_S = 5.0
SUMMARY_FILE, PICTURE_FILE = "summary.json", "demo.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """The load of a demo."""

    seconds: float = 60.0
    """How long requests arrive."""
    requests_per_s: float = 2.0
    max_tokens: tuple[int, int] = (16, 48)
    """Each request asks for a number of tokens drawn from this range."""
    chat_share: float = 0.5
    """Share of the requests that ask by chat, where the model has a chat template."""
    seed: int = 0
    """Draws the arrival times, the prompts, the routes and the numbers of tokens."""


async def run_demo(
    cluster_options: ClusterOptions, options: DemoOptions, data: DemoData, view: DemoView, clock: Clock
) -> Summary:
    """Start a cluster, load it, train it, measure it, stop it; write summary.json and demo.png.

    Raises ConfigurationError, ClusterFailedError, ApiError, or ProgressError when training does not
    come to its end.
    """
    began_s = clock.now_s()
    # A server that was running before may hold the batches of earlier runs.
    # What is measured is the newest weights, which a guard would hold back for a while.
    settings = {**cluster_options.extra_env, "LEMIX_TRAIN_FROM": "next", "LEMIX_GUARD_SAMPLES": "0"}
    cluster_options = replace(cluster_options, extra_env=settings)
    clear(cluster_options.run_dir)
    view.say(f"starting {cluster_options.nodes} nodes x {cluster_options.stages} stages")
    async with LocalCluster(cluster_options, on_event=view.say) as cluster, asyncio.TaskGroup() as group:
        watch = group.create_task(cluster.wait_failed())
        model = await served_model(cluster.api_url, cluster.api_tls)
        view.say(f"{cluster.api_url} serves {model}")
        async with (
            open_bus(cluster.nats_url, cluster.nats_users, Role.INGEST) as bus,
            ApiClient(cluster.api_url, model=model, tls=cluster.api_tls) as api,
        ):
            demo = Demo(api, bus, options, data, view, clock, num_nodes=cluster_options.nodes)
            summary = await demo.run()
        watch.cancel()
    summary = summary.model_copy(update={"wall_s": clock.now_s() - began_s})
    (cluster_options.run_dir / SUMMARY_FILE).write_text(summary.model_dump_json(indent=2) + "\n")
    draw_demo(demo.record, cluster_options.run_dir / PICTURE_FILE)
    return summary


class Demo:
    """The measurements on a running cluster."""

    def __init__(
        self,
        api: ApiClient,
        bus: Bus,
        options: DemoOptions,
        data: DemoData,
        view: DemoView,
        clock: Clock,
        *,
        num_nodes: int,
    ) -> None:
        self._api = api
        self._bus = bus
        self._options = options
        self._data = data
        self._view = view
        self._clock = clock
        self._num_nodes = num_nodes
        self._loaded_s = 0.0
        """When requests began, by the clock."""
        self.record = DemoRecord()

    async def run(self) -> Summary:
        """Loss before, load and training together, loss after."""
        await wait_nodes_ready(self._bus, self._num_nodes)
        applied = await AppliedBatches.following(self._bus)
        began_s = self._clock.now_s()
        before = await self._served_loss("before")
        self.record.losses.append(LossPoint(0.0, await self._probed_loss()))
        self._loaded_s = self._clock.now_s()
        applied_s = await self._serve_and_train(applied)
        after = await self._served_loss("after")
        outcomes = self.record.outcomes
        return summarise(
            outcomes,
            training=self._training(applied, applied_s),
            served_loss=ServedLoss(before=before, after=after),
            load_s=max((outcome.ended_s for outcome in outcomes), default=self._loaded_s) - self._loaded_s,
            wall_s=self._clock.now_s() - began_s,
        )

    def _since_load_s(self) -> float:
        return self._clock.now_s() - self._loaded_s

    async def _served_loss(self, when: str) -> float:
        with self._view.task(f"held-out loss {when}", len(self._data.held_out)) as advance:
            return await served_loss(self._api, self._data.held_out, nodes=self._num_nodes, on_scored=advance)

    async def _serve_and_train(self, applied: AppliedBatches) -> float:
        """Both at once; returns the seconds from the beginning until the last step."""
        async with asyncio.TaskGroup() as watching:
            probe = watching.create_task(self._follow_loss())
            async with asyncio.TaskGroup() as work:
                work.create_task(self._serve())
                work.create_task(self._publish())
                training = work.create_task(self._until_applied(applied))
            probe.cancel()
        await self._add_to_curve()
        return training.result()

    async def _follow_loss(self) -> None:
        """Add to the loss curve until cancelled."""
        while True:
            await asyncio.sleep(PROBE_EVERY_S)
            await self._add_to_curve()

    async def _add_to_curve(self) -> None:
        """Add one point, at the middle of the time that measuring it took."""
        began_s = self._since_load_s()
        loss = await self._probed_loss()
        self.record.losses.append(LossPoint((began_s + self._since_load_s()) / 2, loss))

    async def _probed_loss(self) -> float:
        return await served_loss(self._api, self._data.held_out[:PROBED_LINES], nodes=self._num_nodes)

    async def _serve(self) -> None:
        plan = plan_requests(
            self._data.prompts,
            rate_per_s=self._options.requests_per_s,
            duration_s=self._options.seconds,
            max_tokens=self._options.max_tokens,
            chat_share=self._options.chat_share if self._data.has_chat else 0.0,
            rng=random.Random(self._options.seed),
        )
        with self._view.task("requests answered", len(plan)) as advance:
            self.record.outcomes = await run_requests(
                self._api, plan, clock=self._clock, on_outcome=lambda _: advance(1)
            )

    async def _publish(self) -> None:
        gap_s = self._options.seconds * PUBLISHING_SHARE / len(self._data.batches)
        with self._view.task("batches published", len(self._data.batches)) as advance:
            async for _ in publish_batches(self._bus, self._data.batches):
                advance(1)
                await asyncio.sleep(gap_s)

    async def _until_applied(self, applied: AppliedBatches) -> float:
        """Seconds from the beginning of the load until the weights contained every batch."""
        with self._view.task("batches applied", len(self._data.batches)) as advance:

            def note(number: int) -> None:
                self.record.applied_at_s += [self._since_load_s()] * number
                advance(number)

            await applied.wait_for([batch.batch_id for batch in self._data.batches], on_applied=note)
        return self._since_load_s()

    def _training(self, applied: AppliedBatches, applied_s: float) -> Training:
        return Training(
            batches_published=len(self._data.batches),
            batches_applied=applied.num_batches,
            optimizer_steps=applied.num_steps,
            tokens_per_s=self._data.num_batch_tokens / applied_s,
        )
