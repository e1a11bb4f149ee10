"""The trainer's own decisions in front of a node of real stages, without its bus, files and placing."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite

from msgspec import structs

from services.trainer.nodes.decisions import Action, Applied, Feed, Restore, Skipped, Step, StepsAhead
from services.trainer.nodes.node_training import NodeTraining
from services.trainer.nodes.rules import Rules
from shared.messages.training import BatchStepped, MicrobatchForward, StageReport
from shared.schedule import Feeding, ScheduleName
from tests.support.node import Node
from tests.support.training import Batch, messages

NEVER = 10**6


@dataclass(slots=True)
class Trained:
    """The stages' reports of a run."""

    losses: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By batch."""
    versions: dict[tuple[int, str, int], int] = field(default_factory=dict)
    """(stage, batch, microbatch) -> weights version of its forward."""
    squared_norms: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """The squared norm of each batch's gradients, over all stages."""
    applied: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def note(self, report: StageReport) -> None:
        if isinstance(report.event, BatchStepped):
            self.losses[report.event.batch_id] = report.event.loss


class Driver:
    """Trains a node as `NodeTraining` says; batches may follow each other over several calls."""

    def __init__(
        self,
        node: Node,
        schedule: ScheduleName,
        *,
        max_gradient_norm: float = inf,
    ) -> None:
        node.orders_steps = False
        self._node = node
        self._schedule = schedule
        self._feeding = Feeding(schedule=schedule)
        self._limit = max_gradient_norm if isfinite(max_gradient_norm) else None
        self._training = NodeTraining(
            0,
            node.num_stages,
            rules=Rules(
                feeding=self._feeding,
                checkpoint_every=NEVER,
                checkpoint_idle_s=NEVER,
                max_gradient_norm=max_gradient_norm,
            ),
            durable_version=0,
            fences=iter([1]),
        )
        self._messages: dict[str, Sequence[MicrobatchForward]] = {}
        self.trained = Trained()

    async def start(self) -> None:
        actions = [a for beat in self._node.heartbeats.values() for a in self._training.heartbeat(beat, 0.0)]
        assert [type(action) for action in actions] == [Restore]
        await self._node.restore(fence=self._training.life.fence, feeding=self._feeding)
        assert self._training.restored(self._training.life.fence, "", 0.0) == []

    async def train(self, batches: Mapping[str, Batch], *, loss_weight: float | None = None) -> Trained:
        """Returns when all batches are applied or skipped. `loss_weight`: another than the mean's."""
        changes = {"backward_after_all": self._schedule == "gpipe"}
        for batch_id, batch in batches.items():
            forwards = messages(batch_id, batch, fence=self._training.life.fence)
            self._messages[batch_id] = [_changed(forward, loss_weight, **changes) for forward in forwards]
            await self._run(self._training.work.place(batch_id, 0.0))
        while self._training.work.steps.placed.batch_ids:
            report = await self._node.report()
            self.trained.note(report)
            await self._run(self._training.report(report, 0.0))
        self.trained.versions.update(self._node.versions)
        self.trained.squared_norms.update(self._node.squared_norms)
        return self.trained

    async def _run(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Feed(batch_id=batch_id):
                    for forward in self._messages[batch_id]:
                        await self._node.feed(forward)
                case StepsAhead(batch_id=batch_id, version=version):
                    await self._node.step_ahead(batch_id, version=version, max_gradient_norm=self._limit)
                case Step():
                    await self._node.order(
                        self._training.life.fence,
                        action.batch_id,
                        version=action.version,
                        gradient_scale=action.gradient_scale,
                        skip=action.is_skipped,
                    )
                case Applied(batch_id=batch_id):
                    self.trained.applied.append(batch_id)
                case Skipped(batch_id=batch_id):
                    self.trained.skipped.append(batch_id)
                case _:
                    raise AssertionError(action)


def _changed(forward: MicrobatchForward, loss_weight: float | None, **changes: bool) -> MicrobatchForward:
    weight = forward.microbatch.loss_weight if loss_weight is None else loss_weight
    microbatch = structs.replace(forward.microbatch, loss_weight=weight, **changes)
    return structs.replace(forward, microbatch=microbatch)
