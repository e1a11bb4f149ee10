"""The edge of one stage: loads, meets its neighbours, tells how it stands, and queues its device's work.

    bus --> pipeline/serving.py  (requests, iterations) --.
        --> training/training.py (microbatches, weights) --+--> pipeline/queue.py (one at a time) --> compute/
        --> training/merging.py  (means with other nodes) --'
        --> training/checking.py (what trains, to compare) '

The halves know neither each other nor this file; the last two go by the training's fence and version.
"""

import asyncio
import logging
from typing import Any

from services.stage_worker.compute.executor import Executor, ModelFacts
from services.stage_worker.context import Ignored, WorkerContext
from services.stage_worker.pipeline.device import Device
from services.stage_worker.pipeline.progress import Progress
from services.stage_worker.pipeline.serving import Serving
from services.stage_worker.settings import StageWorkerSettings
from services.stage_worker.training.checking import Checking
from services.stage_worker.training.merging import Merging
from services.stage_worker.training.training import Training
from shared import subjects
from shared.bus.base import Bus, Incoming
from shared.clock import Clock, on_time
from shared.errors import BusError, ConfigurationError
from shared.messages.cluster import Heartbeat, LinkAnswer, LinkOffer, LinkPurpose, StageStopped
from shared.messages.weights import RestoreWeights
from shared.task_groups import start_unless_ending
from shared.telemetry import Telemetry

LOST_AFTER_S = 3 * subjects.HEARTBEAT_S
LINK_TIMEOUT_S = 5.0

Target = tuple[int, LinkPurpose]
"""A stage that this one sends tensors to, and which."""

log = logging.getLogger(__name__)


class StageWorker:
    """One stage of one node. The same class runs in every world; only bus, clock and executor differ."""

    def __init__(
        self,
        *,
        settings: StageWorkerSettings,
        instance: str,
        device: Device,
        bus: Bus,
        clock: Clock,
        telemetry: Telemetry,
        executor: Executor[Any, Any],
    ) -> None:
        """`device`: others run its queue. Raises ConfigurationError for a stage beyond `num_stages`."""
        if settings.stage >= settings.num_stages:
            raise ConfigurationError(f"stage {settings.stage} is not below num_stages {settings.num_stages}")
        self._settings = settings
        self._instance = instance
        self._bus = bus
        self._clock = clock
        self._executor = executor
        self._queue = device.queue
        self._first_on_device = device.first_stage
        self._progress = Progress(
            node=settings.node, stage=settings.stage, turns=device.turns, bus=bus, clock=clock
        )
        self._context = WorkerContext(
            settings=settings,
            bus=bus,
            clock=clock,
            telemetry=telemetry,
            executor=executor,
            queue=self._queue,
            progress=self._progress,
            ignored=Ignored(),
        )
        self._seen: dict[int, tuple[Heartbeat, float]] = {}
        """Other stages of the node: the last heartbeat, and when it came."""
        self._silent: set[int] = set()
        """Those that were not heard of lately."""
        self._linked: dict[Target, str] = {}
        """Where this stage can send tensors to, with the instance that accepted."""
        self._linking: set[Target] = set()
        self._refused: set[tuple[str, str]] = set()
        """(instance, carrier): refusals that were logged."""
        self.is_ready = False
        """Whether it was ready at its last heartbeat."""
        self._published_whole = False
        """Whether the last heartbeat said that the node is whole (stage 0)."""

    async def run(self) -> None:
        """Load the model, then serve and train until cancelled."""
        facts = await self._executor.load()
        self._num_slices = facts.num_slices
        self._targets = self._targets_of(facts)
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await self._subscribe(facts)
                group.create_task(self._progress.run())
                group.create_task(self._beat())
                group.create_task(self._watch_for_silence())
        finally:
            await self._executor.close()
            await self._say_goodbye()

    def _targets_of(self, facts: ModelFacts) -> set[Target]:
        stage, last = self._settings.stage, self._settings.num_stages - 1
        targets: set[Target] = {
            (other, "activations") for other in (stage - 1, stage + 1) if 0 <= other <= last
        }
        if facts.is_tied_across_stages and stage in (0, last):
            targets.add((last - stage, "tied"))
        return targets

    async def _subscribe(self, facts: ModelFacts) -> None:
        self._serving = Serving(self._context, facts, is_node_whole=self._is_node_whole)
        self._training = Training(
            self._context,
            facts,
            group=self._group,
            note_version=self._serving.set_version,
            note_restored=self._on_restored,
        )
        place = {"node": self._settings.node, "stage": self._settings.stage}
        await self._bus.respond(subjects.LINK.at(**place), self._on_link_offer)
        await self._serving.subscribe()
        await self._training.subscribe()
        await Merging(self._context, self._training, group=self._group).subscribe()
        await Checking(self._context, self._training).subscribe()
        await self._bus.subscribe(subjects.NEIGHBOUR.at(node=self._settings.node), self._on_heartbeat)

    async def _on_restored(self, message: RestoreWeights, is_same: bool) -> None:
        await self._serving.restored(message, is_same=is_same)
        await self._publish_heartbeat()

    # Neighbours

    async def _on_link_offer(self, incoming: Incoming[LinkOffer]) -> LinkAnswer:
        return await self._executor.accept(incoming.message)

    async def _on_heartbeat(self, incoming: Incoming[Heartbeat]) -> None:
        beat = incoming.message
        if beat.stage == self._settings.stage:
            return
        known = self._seen[beat.stage][0].instance if beat.stage in self._seen else None
        self._seen[beat.stage] = (beat, self._clock.now_s())
        self._silent.discard(beat.stage)
        self._serving.scheduler.blocks.limit(beat.kv_blocks_total)
        if known != beat.instance:
            await self._meet(beat.stage, is_restart=known is not None)
        self._start_linking(beat)
        await self._publish_wholeness()
        self._serving.pump()

    async def _publish_wholeness(self) -> None:
        if self._settings.stage == 0 and self._is_node_whole() != self._published_whole:
            await self._publish_heartbeat()
            log.info("node %d is %s", self._settings.node, "whole" if self._published_whole else "not whole")

    async def _meet(self, stage: int, *, is_restart: bool) -> None:
        if is_restart:
            await self._serving.reset(f"stage {stage} of the node was restarted")
            if stage == 0:  # which knows of no sequence that began before
                self._serving.sequences.clear()
        await self._publish_heartbeat()  # so that the newcomer need not wait for the next one

    def _start_linking(self, beat: Heartbeat) -> None:
        for target in self._targets - self._linking:
            if target[0] == beat.stage and not self._is_linked(target, beat.instance):
                self._linked.pop(target, None)
                self._linking.add(target)
                start_unless_ending(self._group, self._link(target, beat.instance))

    async def _link(self, target: Target, instance: str) -> None:
        """Offer a link; a peer that does not accept is offered another at its next heartbeat."""
        stage, purpose = target
        try:
            offer = await self._executor.offer(stage, instance, purpose)
            place = subjects.LINK.at(node=self._settings.node, stage=stage)
            answer = await self._bus.request(place, offer, timeout_s=LINK_TIMEOUT_S)
            await self._executor.connect(stage, purpose, answer)
        except BusError as error:
            log.warning("no link to stage %d yet: %s", stage, error)
            return
        finally:  # not before: an offer replaces the link of the one before it
            self._linking.discard(target)
        if not answer.accepted:
            self._log_refusal(stage, instance, offer.carrier, answer.reason)
            return
        self._linked[target] = instance
        await self._publish_heartbeat()
        self._serving.pump()

    def _log_refusal(self, stage: int, instance: str, carrier: str, reason: str) -> None:
        if (instance, carrier) not in self._refused:
            self._refused.add((instance, carrier))
            log.warning("no %s to stage %d: %s. Another way is tried.", carrier, stage, reason)

    def _is_linked(self, target: Target, instance: str) -> bool:
        return self._linked.get(target) == instance and not self._executor.is_link_lost(*target)

    def _is_ready(self) -> bool:
        """Whether this stage can send tensors to every stage that it has to."""
        return all(
            (beat := self._heard_lately(target[0])) is not None and self._is_linked(target, beat.instance)
            for target in self._targets
        )

    def _is_node_whole(self) -> bool:
        """Whether requests can go through all stages, and meet weights of one lineage on their way."""
        others = set(range(self._settings.num_stages)) - {self._settings.stage}
        return self._is_ready() and all(
            (beat := self._heard_lately(stage)) is not None and beat.ready and self._has_same_weights(beat)
            for stage in others
        )

    def _has_same_weights(self, beat: Heartbeat) -> bool:
        """A restore puts all stages on one version; a stage that restarts falls back to an older one."""
        training = self._training
        if training.restored_fence and training.restored_fence == beat.fence:
            return True
        own = (
            training.versions.version,
            training.versions.origin.checkpoint,
            training.versions.origin.digest,
        )
        return own == (beat.weights_version, beat.checkpoint, beat.checkpoint_digest)

    def _heard_lately(self, stage: int) -> Heartbeat | None:
        return None if stage in self._silent or stage not in self._seen else self._seen[stage][0]

    async def _watch_for_silence(self) -> None:
        """Note who has fallen silent; runs until cancelled."""
        every_s = subjects.HEARTBEAT_S / 2
        async for _ in on_time(every_s, at_most_late_s=subjects.HEARTBEAT_S, clock=self._clock):
            now_s = self._clock.now_s()
            self._silent |= {
                stage for stage, (_, when_s) in self._seen.items() if now_s - when_s >= LOST_AFTER_S
            }

    # How it stands

    async def _beat(self) -> None:
        try:
            while True:
                await self._publish_heartbeat()
                await self._serving.tick()
                is_ready = self._is_ready()
                if self.is_ready and not is_ready:
                    await self._serving.reset("a stage of the node is lost")
                self.is_ready = is_ready
                await asyncio.sleep(subjects.HEARTBEAT_S)
        finally:
            self._serving.close()

    async def _publish_heartbeat(self) -> None:
        settings, scheduler, training = self._settings, self._serving.scheduler, self._training
        published = scheduler.versions.published
        self._published_whole = settings.stage == 0 and self._is_node_whole()
        beat = Heartbeat(
            node=settings.node,
            stage=settings.stage,
            num_stages=settings.num_stages,
            instance=self._instance,
            model=settings.model,
            device=settings.device,
            profile=settings.node_profile or settings.emulate,
            first_on_device=self._first_on_device,
            num_slices=self._num_slices,
            ready=self._is_ready(),
            whole=self._published_whole,
            weights_version=training.versions.version,
            sick_version=self._serving.sick_version,
            checkpoint=training.versions.origin.checkpoint,
            checkpoint_digest=training.versions.origin.digest,
            fence=training.restored_fence,
            running=scheduler.num_running,
            waiting=len(scheduler.admission),
            queued=len(self._queue),
            preempted=scheduler.num_preempted,
            kv_blocks_used=scheduler.blocks.num_blocks - scheduler.blocks.num_free,
            kv_blocks_total=scheduler.blocks.num_blocks,
            kv_block_size=settings.kv_block_size,
            max_iteration_tokens=settings.iteration_tokens,
            serving_version=training.versions.version if published is None else published,
        )
        await self._bus.publish(subjects.HEARTBEAT.at(), beat)
        await self._bus.publish(subjects.NEIGHBOUR.at(node=settings.node), beat)

    async def _say_goodbye(self) -> None:
        gone = StageStopped(node=self._settings.node, stage=self._settings.stage, instance=self._instance)
        await self._bus.publish(subjects.STOPPED.at(), gone)
