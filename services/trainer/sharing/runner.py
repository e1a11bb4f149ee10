"""Carries out what is decided for several nodes together."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from services.trainer.ledger.pending_batches import BatchBook
from services.trainer.nodes.ask_all import ask_all
from services.trainer.nodes.decisions import Action
from services.trainer.nodes.node_training import NodeTraining
from services.trainer.outbox import Outbox
from services.trainer.settings import TrainerSettings
from services.trainer.sharing.allreduce import Reductions
from services.trainer.sharing.average import Merges
from services.trainer.sharing.decisions import Decision, Joins, Member, Merge, NodeActions, Reduce, Shared
from shared.bus.base import Bus
from shared.clock import Clock
from shared.messages.weights import MergeGroup, MergeMember, MergeWeights, OuterStep, ReduceGradients
from shared.subjects import MERGE, REDUCE

MERGE_TIMEOUT_S = 600.0
Run = Callable[[NodeTraining, Sequence[Action]], None]


class Sharing:
    """Looks at the nodes after everything that happens, until there is nothing to decide."""

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        bus: Bus,
        clock: Clock,
        book: BatchBook,
        outbox: Outbox,
        nodes: Mapping[int, NodeTraining],
        new_name: Callable[[], str],
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._bus = bus
        self._clock = clock
        self._book = book
        self._outbox = outbox
        self._nodes = nodes
        self._tasks = tasks
        self._is_deciding = False
        self._outer = (
            OuterStep(learning_rate=settings.outer_learning_rate, momentum=settings.outer_momentum)
            if settings.merging == "outer"
            else None
        )
        self._replicas = (
            Reductions(
                save_every=settings.checkpoint_every, idle_s=settings.checkpoint_idle_s, new_name=new_name
            )
            if settings.merging == "allreduce"
            else Merges(every=settings.merge_every, idle_s=settings.checkpoint_idle_s, new_name=new_name)
        )

    def decide(self, run: Run) -> None:
        """Decide what can be decided now. `run` carries it out; it may call this again, to no effect."""
        if not self._is_deciding:
            self._work_off([], run)

    def _work_off(self, decisions: list[Decision], run: Run) -> None:
        """Carry these out, and what can be decided then."""
        self._is_deciding = True
        try:
            self._carry_out(decisions, run)
            while decisions := self._replicas.decide(self._nodes, self._clock.now_s()):
                self._carry_out(decisions, run)
        finally:
            self._is_deciding = False

    def _carry_out(self, decisions: list[Decision], run: Run) -> None:
        for decision in decisions:
            match decision:
                case NodeActions(node=node, actions=actions):
                    run(self._nodes[node], actions)
                case Shared(nodes=nodes):
                    self._book.share(nodes)
                case Joins(node=node):
                    self._book.join(node)
                case Reduce():
                    self._reduce(decision)
                case Merge():
                    self._tasks.create_task(self._merge(decision, run))

    def _reduce(self, reduce: Reduce) -> None:
        group = _group(reduce.name, reduce.members)
        for member in reduce.members:
            order = ReduceGradients(fence=member.fence, batch_id=member.batch_id, group=group)
            for stage in range(member.num_stages):
                self._outbox.post(REDUCE.at(node=member.node, stage=stage), order)

    async def _merge(self, merge: Merge, run: Run) -> None:
        group = _group(merge.name, merge.members)
        failures = await asyncio.gather(*(self._ask(member, merge, group) for member in merge.members))
        failure = "; ".join(filter(None, failures))
        assert isinstance(self._replicas, Merges)
        decided = self._replicas.merged(merge.name, failure, self._nodes, self._clock.now_s())
        self._work_off(decided, run)

    async def _ask(self, member: Member, merge: Merge, group: MergeGroup) -> str:
        """Why a stage of the member does not hold the mean; empty when all do."""
        order = MergeWeights(
            fence=member.fence,
            version=merge.version,
            keep=member.is_kept,
            group=group,
            outer=self._outer,
        )
        refusals = await ask_all(
            self._bus,
            MERGE,
            order,
            node=member.node,
            num_stages=member.num_stages,
            timeout_s=MERGE_TIMEOUT_S,
        )
        return "; ".join(f"node {member.node}, stage {stage}: {why}" for stage, why in refusals.items())


def _group(name: str, members: tuple[Member, ...]) -> MergeGroup:
    return MergeGroup(
        name=name,
        members=tuple(MergeMember(node=each.node, fence=each.fence, share=each.share) for each in members),
    )
