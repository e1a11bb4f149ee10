"""The batches of one node, from being placed to being stepped on: feeds them and orders their steps. Pure."""

from dataclasses import replace
from math import isfinite, sqrt

from services.trainer.nodes.decisions import Action, Feed, Step, StepsAhead
from services.trainer.nodes.placed_batches import FedBatch, PlacedBatches
from services.trainer.nodes.rules import Rules
from services.trainer.nodes.saves import NodeSaves
from services.trainer.publication.publishing import Publishing
from shared.messages.training import BatchStepped


class BatchSteps:
    """Orders a step ahead where it can, or when the batch's gradients are known."""

    def __init__(self, version: int, *, rules: Rules, saves: NodeSaves, publishing: Publishing) -> None:
        self.version = version
        """Steps that the weights of every stage contain."""
        self.placed = PlacedBatches()
        self._rules = rules
        self._saves = saves
        self._publishing = publishing

    @property
    def wants_save(self) -> bool:
        """Whether the present version should be durable, because a guard has approved it, or may yet."""
        return self._wants_saved(self.version)

    @property
    def has_nothing_begun(self) -> bool:
        """No batch is on its way through the stages."""
        return not self.placed.fed

    def reset(self, version: int) -> None:
        """Start from that version, without a batch."""
        self.version, self.placed = version, PlacedBatches()

    def place(self, batch_id: str) -> None:
        """Note that a batch has been given to this node."""
        self.placed = self.placed.add(batch_id)

    def feed(self, num_stages: int) -> list[Action]:
        """Feed what there is room for."""
        actions: list[Action] = []
        while self.placed.waiting and len(self.placed.fed) < self._rules.max_fed(num_stages):
            actions.append(Feed(self.placed.waiting[0]))
            self.placed = self.placed.feed()
        return actions

    def order_all(self, now_s: float) -> list[Action]:
        """Order every step that can be; where nodes step together, somebody else does."""
        actions: list[Action] = []
        while (batch := self.placed.unordered) and not self._rules.shares_steps:
            if self._saves.is_unanswered:
                break  # a stage must know that it has to save a version before it steps beyond it
            ordered = self._order_next(batch, now_s)
            if not ordered:
                break
            actions += ordered
        return actions

    def order(
        self,
        version: int,
        now_s: float,
        *,
        rate_of: tuple[str, ...] = (),
        squared_norm: float | None = None,
        may_save: bool = False,
    ) -> list[Action]:
        """Step on the complete batch, to `version`; skip it when its gradients are not finite.

        `rate_of`: the batches of all nodes that step together. `squared_norm`: of the gradients, where nodes
        must not differ; None: what the stages here have found. `may_save`: that version may be saved.
        """
        batch = self.placed.complete
        assert batch is not None and batch.squared_norm is not None
        squared_norm = batch.squared_norm if squared_norm is None else squared_norm
        step = replace(self._step_of(batch.batch_id, squared_norm, version, may_save), rate_of=rate_of)
        self.placed = self.placed.order(step.batch_id, step.version, is_skipped=step.is_skipped)
        return [step, *self._save_if_due(step.version, now_s)]

    def skip(self, now_s: float) -> list[Action]:
        """Drop the complete batch, whose own gradients are not finite, before others are averaged with it."""
        return self.order(self.version, now_s)

    def join(self, name: str) -> str:
        """Let the averaged gradients take the place of this node's; returns its batch, empty without one."""
        batch = self.placed.complete
        self.placed = self.placed.join(batch.batch_id if batch else name)
        return batch.batch_id if batch else ""

    def ready(self, batch_id: str, squared_norm: float) -> None:
        """Stages wait for an order; one that was given ahead is on its way, and holds if all is finite."""
        batch = self.placed.find(batch_id)
        if batch is None:
            return
        if batch.version is not None:
            if isfinite(squared_norm):
                return
            self.placed = self.placed.revoke_from(batch_id)
            self._publishing.revoke_from(batch.version)
        self.placed = self.placed.ready(batch_id, squared_norm)

    def misstep(self, event: BatchStepped) -> str:
        """How the stages have stepped other than ordered; empty: they have not."""
        batch = self.placed.find(event.batch_id)
        if batch is None or event.version == batch.version:
            return ""
        return f"the node is at version {event.version} after {event.batch_id}, not at {batch.version}"

    def stepped(self, batch: FedBatch, now_s: float) -> None:
        """Note that all stages have done as ordered."""
        assert batch.version is not None
        self.placed = self.placed.stepped(batch.batch_id)
        self.version = batch.version
        self._saves.reached(self.version, now_s)

    def begin_keeping(self, version: int, *, may_save: bool) -> bool:
        """Returns whether stages shall keep that version. A guard waits for one that is saved, too."""
        may_keep = may_save or not self._publishing.is_guarded
        return may_keep and self._publishing.begin_keeping(version)

    def _order_next(self, batch: FedBatch, now_s: float) -> list[Action]:
        version = self._present_version + 1
        is_apart = not self._rules.shares_weights
        may_save = is_apart and not self._saves.is_saving and self._saves.schedule.is_within_bound(now_s)
        if batch.squared_norm is not None:
            return self.order(version, now_s, may_save=may_save)
        return self._order_ahead(batch.batch_id, version, now_s, may_save=may_save)

    def _order_ahead(self, batch_id: str, version: int, now_s: float, *, may_save: bool) -> list[Action]:
        """Give the step ahead, and say whether that version is kept or saved; [] if this is known only later.

        A guard takes no version that is saved with others, or that the bound on bytes leaves unsaved.
        """
        is_kept = self.begin_keeping(version, may_save=may_save)
        is_saved_by_itself = not self._rules.shares_weights and self._saves.schedule.is_within_bound(now_s)
        is_decided = is_kept or (self._publishing.is_guarded and not is_saved_by_itself)
        if not is_decided and self._publishing.may_keep_later(version):
            return []
        self.placed = self.placed.order(batch_id, version)
        return [StepsAhead(batch_id, version, is_kept=is_kept), *self._save_if_due(version, now_s)]

    def _step_of(self, batch_id: str, squared_norm: float, version: int, may_save: bool) -> Step:
        if not isfinite(squared_norm):
            return Step(batch_id, self._present_version, is_skipped=True)
        norm, limit = sqrt(squared_norm), self._rules.max_gradient_norm
        return Step(
            batch_id,
            version,
            gradient_scale=limit / norm if norm > limit else 1.0,
            is_kept=self.begin_keeping(version, may_save=may_save),
        )

    def _save_if_due(self, version: int, now_s: float) -> list[Action]:
        """A step to that version is ordered."""
        return self._saves.request_if_due(version, now_s, is_wanted=self._wants_saved(version))

    def _wants_saved(self, version: int) -> bool:
        return version != self._saves.durable_version and self._publishing.wants_saved(version)

    @property
    def _present_version(self) -> int:
        """The version of the weights when all ordered steps are done."""
        ordered = self.placed.ordered_version
        return self.version if ordered is None else ordered
