"""The batches that are placed on a node: they wait, are fed, ordered to step, and stepped on. Pure.

Stage 0 lets a batch's microbatches enter as the schedule says, and tells when all stages have stepped.
"""

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class FedBatch:
    """A batch that has been fed, and that not every stage has stepped for."""

    batch_id: str
    squared_norm: float | None = None
    """The squared norm of its gradients over all stages, which wait for an order; None: none are known."""
    version: int | None = None
    """The version of the weights after its step, once that is ordered; the present one when it is skipped."""
    is_skipped: bool = False
    is_joint: bool = False
    """Its gradients are, or will be, the mean over several nodes."""
    is_placeholder: bool = False
    """There is no batch here: the node steps with others all the same."""


@dataclass(frozen=True, slots=True)
class PlacedBatches:
    """All batches of one node that are not applied."""

    waiting: tuple[str, ...] = ()
    """Ids of those that are not fed, in order."""
    fed: tuple[FedBatch, ...] = ()
    """In order."""

    @property
    def is_empty(self) -> bool:
        return not self.waiting and not self.fed

    @property
    def batch_ids(self) -> tuple[str, ...]:
        """Every batch, in order."""
        return tuple(batch.batch_id for batch in self.fed if not batch.is_placeholder) + self.waiting

    @property
    def unordered(self) -> FedBatch | None:
        """The oldest one whose step is not ordered."""
        return next((batch for batch in self.fed if batch.version is None), None)

    @property
    def complete(self) -> FedBatch | None:
        """The same, if every stage has all its gradients, and they wait for the order."""
        batch = self.unordered
        return batch if batch is not None and batch.squared_norm is not None else None

    @property
    def squared_norm(self) -> float | None:
        """The squared norm of the complete batch's gradients; None without one."""
        return self.complete.squared_norm if self.complete else None

    @property
    def has_joint_gradients(self) -> bool:
        """Whether every stage has the mean over several nodes, which waits for the order to step."""
        return self.complete is not None and self.complete.is_joint

    @property
    def has_joint_step(self) -> bool:
        """Whether a step that is made with other nodes is not done here."""
        return any(batch.is_joint for batch in self.fed)

    @property
    def ordered_version(self) -> int | None:
        """The version of the weights after all steps that are ordered and not done; None without any."""
        versions = [batch.version for batch in self.fed if batch.version is not None]
        return versions[-1] if versions else None

    def find(self, batch_id: str) -> FedBatch | None:
        """The fed batch of that id."""
        return next((batch for batch in self.fed if batch.batch_id == batch_id), None)

    def add(self, batch_id: str) -> Self:
        return replace(self, waiting=(*self.waiting, batch_id))

    def without(self, batch_ids: Container[str]) -> Self:
        """Remove these batches, which are not fed."""
        return replace(self, waiting=tuple(each for each in self.waiting if each not in batch_ids))

    def feed(self) -> Self:
        """Note that the first one that waits is fed."""
        first, *rest = self.waiting
        return replace(self, waiting=tuple(rest), fed=(*self.fed, FedBatch(first)))

    def ready(self, batch_id: str, squared_norm: float) -> Self:
        """Note that all stages have its gradients, and wait for the order."""
        return self._changed(batch_id, squared_norm=squared_norm)

    def join(self, batch_id: str) -> Self:
        """Note that the mean over several nodes replaces the complete batch's gradients, or stands alone."""
        if self.find(batch_id) is not None:
            return self._changed(batch_id, squared_norm=None, is_joint=True)
        placeholder = FedBatch(batch_id, is_joint=True, is_placeholder=True)
        return replace(self, fed=(*self.fed, placeholder))

    def order(self, batch_id: str, version: int, *, is_skipped: bool = False) -> Self:
        """Note that its step is ordered."""
        return self._changed(batch_id, version=version, is_skipped=is_skipped)

    def revoke_from(self, batch_id: str) -> Self:
        """Note that the orders of this batch and of those after it do not hold: stages have not obeyed."""
        place = [batch.batch_id for batch in self.fed].index(batch_id)
        revoked = tuple(replace(batch, version=None) for batch in self.fed[place:])
        return replace(self, fed=self.fed[:place] + revoked)

    def stepped(self, batch_id: str) -> Self:
        """Note that all stages have done as ordered."""
        return replace(self, fed=tuple(batch for batch in self.fed if batch.batch_id != batch_id))

    def _changed(self, batch_id: str, **changes: object) -> Self:
        fed = (replace(each, **changes) if each.batch_id == batch_id else each for each in self.fed)  # type: ignore[arg-type]
        return replace(self, fed=tuple(fed))
