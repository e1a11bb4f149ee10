"""Carries out the nodes' decisions: has messages sent and the book kept, and starts what takes time."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial

from services.trainer.checkpoints.checkpointing import Checkpointing
from services.trainer.checkpoints.manifests import Verdict
from services.trainer.checkpoints.rollbacks import Rollbacks
from services.trainer.checkpoints.verdicts import Verdicts
from services.trainer.ledger.fates import BatchFates
from services.trainer.nodes.decisions import (
    Action,
    Applied,
    Closed,
    Feed,
    Halted,
    RequestSave,
    Restore,
    RollBack,
    SaveAbandoned,
    Skipped,
    Step,
    StepsAhead,
    WriteCheckpoint,
)
from services.trainer.nodes.node_training import NodeTraining
from services.trainer.nodes.stage_orders import StageOrders
from services.trainer.publication.evaluator import Evaluator
from services.trainer.publication.losses import Losses
from services.trainer.publication.publishing import Evaluate, Keep, Publish, Release, Withheld
from services.trainer.sharing.runner import Sharing

Decide = Callable[[], Awaitable[Sequence[Action]]]

log = logging.getLogger(__name__)


class ActionRunner:
    """Changes state at once; whatever takes time runs in `tasks`, and its outcome is carried out, too."""

    def __init__(
        self,
        *,
        orders: StageOrders,
        fates: BatchFates,
        checkpointing: Checkpointing,
        rollbacks: Rollbacks,
        evaluator: Evaluator,
        verdicts: Verdicts,
        sharing: Sharing | None,
        tasks: asyncio.TaskGroup,
    ) -> None:
        """`sharing`: decides for several nodes together; None: each trains apart."""
        self._orders = orders
        self._fates = fates
        self._checkpointing = checkpointing
        self._rollbacks = rollbacks
        self._evaluator = evaluator
        self._verdicts = verdicts
        self._sharing = sharing
        self._tasks = tasks

    def run(self, node: NodeTraining, actions: Sequence[Action]) -> None:
        """Carry out what `node` has just decided."""
        for action in actions:
            match action:
                case Feed(batch_id=batch_id):
                    self._orders.feed(node, batch_id)
                case StepsAhead():
                    self._orders.step_ahead(node, action)
                case Step():
                    self._orders.step(node, action)
                case Applied():
                    self._fates.applied(node.node, action)
                case Skipped():
                    self._fates.skipped(action)
                case Halted(reason=reason, unfinished=unfinished):
                    log.error("node %d trains no more: %s", node.node, reason)
                    self._fates.give_back(unfinished)
                case Closed():
                    self._forget(node.node)
                    self._fates.closed(node.node, action)
                case Publish(version=version):
                    self._orders.publish(node, version)
                case Release(version=version):
                    self._orders.release(node, version)
                case Keep(version=version):
                    self._begin(node, partial(self._orders.keep, node, version))
                case Evaluate(version=version):
                    self._evaluate(node, version)
                case Withheld(version=version, reason=reason):
                    log.error("node %d: version %d is not served: %s", node.node, version, reason)
                case SaveAbandoned(version=version, reason=reason):
                    log.error("node %d: no checkpoint of version %d: %s", node.node, version, reason)
                case Restore():
                    self._begin(node, partial(self._checkpointing.restore, node, action))
                case RequestSave():
                    self._begin(node, partial(self._checkpointing.request_save, node, action))
                case WriteCheckpoint():
                    self._tasks.create_task(self._write(node, action))
                case RollBack():
                    self._forget(node.node)
                    self._fates.give_back(action.unfinished)
                    self._rollbacks.note_closed(node.node)
        if actions:
            self._fates.changed.set()
        if self._sharing is not None:
            self._sharing.decide(self.run)

    def run_all(self, decided: Iterable[tuple[NodeTraining, Sequence[Action]]]) -> None:
        """Carry out the decisions of several nodes; all are decided before the first is carried out."""
        for node, actions in decided:
            self.run(node, actions)

    def _begin(self, node: NodeTraining, decide: Decide) -> None:
        self._tasks.create_task(self._run_when_decided(node, decide))

    async def _run_when_decided(self, node: NodeTraining, decide: Decide) -> None:
        self.run(node, await decide())

    async def _write(self, node: NodeTraining, action: WriteCheckpoint) -> None:
        self.run(node, await self._checkpointing.write(node, action))
        if not node.life.is_rolling_back:  # which may need the oldest of them
            await self._checkpointing.prune(node.node)

    def _evaluate(self, node: NodeTraining, version: int) -> None:
        newest_loss = self._fates.progress.training_losses.get(node.node)
        loss = newest_loss if version == node.version else None
        on_losses = partial(self._note_evaluated, node, node.life.fence, version, loss)
        self._evaluator.begin(node.node, version, on_losses)

    def _note_evaluated(
        self,
        node: NodeTraining,
        fence: int,
        version: int,
        training_loss: float | None,
        losses: Losses | None,
    ) -> None:
        self.run(node, node.in_life(fence, lambda work: work.publishing.evaluated(version, losses)))
        if losses is None or fence != node.life.fence:
            return
        publishing = node.work.publishing
        may_serve, why_withheld = publishing.published == version, publishing.why_withheld(version)
        if not (may_serve or why_withheld):
            return  # it could not be compared with what serves
        verdict = Verdict(
            version,
            losses,
            may_serve=may_serve,
            rise=publishing.limits.rise(losses.held_out),
            why_withheld=why_withheld,
            training_loss=training_loss,
        )
        self._verdicts.add(node.node, verdict)

    def _forget(self, node: int) -> None:
        """The node begins anew or is rolled back: what its newer versions were is of no use."""
        self._verdicts.forget(node)
        self._fates.progress.training_losses.pop(node, None)
