"""Listens to the stages of all nodes and hands their messages to the state of their node."""

import itertools

from services.trainer.checkpoints.verdicts import Verdicts
from services.trainer.ledger.pending_batches import BatchBook
from services.trainer.ledger.progress import Progress
from services.trainer.nodes.lease import TrainerLease
from services.trainer.nodes.node_training import NodeTraining
from services.trainer.nodes.rules import Rules
from services.trainer.nodes.runner import ActionRunner
from services.trainer.nodes.weights_checks import WeightsChecks
from services.trainer.publication.publishing import PublishingRules
from services.trainer.settings import TrainerSettings
from services.trainer.sharing.decisions import is_rollback_under_way
from shared.bus.base import Bus, Incoming
from shared.clock import Clock, on_time
from shared.errors import ConfigurationError
from shared.messages.cluster import Heartbeat
from shared.messages.training import CheckScored, StageReport
from shared.messages.weights import NodeWeights, WeightsRequest, WeightsStatus
from shared.subjects import HEARTBEAT_S

SHORTEST_TICK_S = 0.01


class Nodes:
    """All nodes that were ever heard of."""

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        bus: Bus,
        clock: Clock,
        book: BatchBook,
        actions: ActionRunner,
        progress: Progress,
        verdicts: Verdicts,
        checks: WeightsChecks | None,
        by_number: dict[int, NodeTraining],
        lease: TrainerLease,
    ) -> None:
        """`by_number`: empty at first; whoever decides for several nodes looks at them there.

        `checks`: None where nothing is computed that could be compared.
        """
        self.by_number = by_number
        self._bus = bus
        self._num_reconnects = bus.num_reconnects
        self._clock = clock
        self._book = book
        self._actions = actions
        self._progress = progress
        self._verdicts = verdicts
        self._checks = checks
        self._lease = lease
        self._fences = itertools.count(lease.first_fence)
        self._rules = Rules(
            feeding=settings.feeding,
            microbatches=settings.microbatches,
            checkpoint_every=settings.checkpoint_every,
            checkpoint_idle_s=settings.checkpoint_idle_s,
            checkpoint_bytes_per_s=settings.checkpoint_gb_per_hour * 1e9 / 3600,
            shares_weights=settings.shares_weights,
            shares_steps=settings.merging == "allreduce",
            max_gradient_norm=settings.max_gradient_norm,
            max_skips=settings.max_skips,
            publishing=PublishingRules(
                serving=settings.serving,
                max_kept=settings.max_kept_versions,
                evaluate_every=settings.evaluate_every if settings.is_guarded else 0,
                max_rise=settings.max_held_out_rise,
                max_samples_rise=settings.max_samples_rise,
            ),
        )
        self._settings = settings
        self._tick_s = max(SHORTEST_TICK_S, min(HEARTBEAT_S, settings.checkpoint_idle_s) / 4)

    @property
    def num_wanted(self) -> int:
        """Batches that may be placed and not applied: they fill the pipelines, and each node has its next."""
        return sum(node.work.num_wanted for node in self._known)

    @property
    def have_room(self) -> bool:
        """Whether one more batch may be placed."""
        return sum(len(node.work.steps.placed.batch_ids) for node in self._known) < self.num_wanted

    @property
    def _known(self) -> list[NodeTraining]:
        return [node for node in self.by_number.values() if node.is_known]

    async def on_heartbeat(self, incoming: Incoming[Heartbeat]) -> None:
        """Take in a sign of life of a stage.

        Raises ConfigurationError when another trainer leads, or the stage has no place in this run.
        """
        beat = incoming.message
        if self._lease.is_later(beat.fence):
            await self._lease.check_claim(f"node {beat.node}, stage {beat.stage} follows fence {beat.fence}")
            return
        self._check_stages(beat)
        if beat.node not in self.by_number and is_rollback_under_way(self.by_number):
            return  # when the others are back, its next heartbeat finds where they are
        node = self.by_number.get(beat.node) or self._add(beat)
        self._actions.run(node, node.heartbeat(beat, self._clock.now_s()))

    async def on_report(self, incoming: Incoming[StageReport]) -> None:
        """Take in an event on a stage."""
        report = incoming.message
        if isinstance(report.event, CheckScored):
            if self._checks is not None:
                self._checks.scored(report, report.event)
        elif node := self.by_number.get(report.node):
            self._actions.run(node, node.report(report, self._clock.now_s()))

    async def on_status(self, incoming: Incoming[WeightsRequest]) -> WeightsStatus:
        """Answer a question about the nodes' weights."""
        nodes = tuple(self._weights_of(node) for _, node in sorted(self.by_number.items()))
        return WeightsStatus(nodes=nodes, shares_weights=self._settings.shares_weights)

    def place(self, number: int, batch_id: str) -> bool:
        """Give a batch to a node; False when the node is gone."""
        node = self.by_number.get(number)
        if node is None or not node.is_known:
            return False
        self._actions.run(node, node.work.place(batch_id, self._clock.now_s()))
        return True

    async def tick(self) -> None:
        """Let time pass on every node, for ever."""
        async for _ in on_time(self._tick_s, at_most_late_s=HEARTBEAT_S, clock=self._clock):
            is_back = self._num_reconnects != self._bus.num_reconnects
            self._num_reconnects = self._bus.num_reconnects
            for node in self.by_number.values():
                if is_back:
                    self._actions.run(node, node.messages_lost())
                self._actions.run(node, node.tick(self._clock.now_s()))
                if self._checks is not None:
                    self._checks.begin_if_due(node)

    def _check_stages(self, beat: Heartbeat) -> None:
        if self._settings.schedule == "dp" and beat.num_stages != 1:
            raise ConfigurationError(
                f"schedule=dp is for nodes of one stage, and node {beat.node} has {beat.num_stages}: "
                "choose another schedule, with LEMIX_MERGE=allreduce"
            )
        others = (
            node
            for node in self.by_number.values()
            if node.node != beat.node
            and node.life.phase != "closed"
            and node.life.members.num_stages != beat.num_stages
        )
        if self._rules.shares_weights and (other := next(others, None)):
            raise ConfigurationError(
                f"node {beat.node} has {beat.num_stages} stages, and node {other.node} has "
                f"{other.life.members.num_stages}: nodes that share their weights need as many"
            )

    def _add(self, beat: Heartbeat) -> NodeTraining:
        if self._rules.shares_weights:
            self._book.join(beat.node)
        durable_version = self._book.ledger.lineage(beat.node).durable_version
        node = NodeTraining(
            beat.node,
            beat.num_stages,
            rules=self._rules,
            durable_version=durable_version,
            fences=self._fences,
        )
        self.by_number[beat.node] = node
        return node

    def _weights_of(self, node: NodeTraining) -> NodeWeights:
        publishing, withheld = node.work.publishing, node.work.publishing.last_withheld
        losses = None if publishing.published is None else publishing.losses.get(publishing.published)
        return NodeWeights(
            node=node.node,
            version=node.version,
            durable_version=node.durable_version,
            published=publishing.published,
            is_guarded=publishing.is_guarded,
            held_out_loss=losses.held_out if losses else None,
            samples_loss=losses.samples if losses else None,
            num_withheld=publishing.num_withheld,
            last_withheld=withheld.version if withheld else None,
            newest_judged=publishing.turns.newest_judged,
            why_withheld=withheld.reason if withheld else "",
            training_loss=self._progress.training_losses.get(node.node),
            judged=self._verdicts.of(node.node),
            why_differing=self._checks.differs.get(node.node) if self._checks is not None else None,
            halt_reason=node.work.gate.halt_reason,
        )
