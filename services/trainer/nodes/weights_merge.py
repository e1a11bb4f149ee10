"""One node's part in a merge of weights: its stages are asked to hold the merged ones, and then do. Pure."""

from services.trainer.nodes.batch_steps import BatchSteps
from services.trainer.nodes.decisions import Action
from services.trainer.publication.publishing import Publishing


class WeightsMerge:
    """Nothing trains on the node from `begin` until `finish` or `cancel`."""

    def __init__(self, steps: BatchSteps, publishing: Publishing) -> None:
        self.is_under_way = False
        """The stages are to hold merged weights, and have not all answered."""
        self._steps = steps
        self._publishing = publishing
        self._is_kept = False

    def begin(self, version: int) -> bool:
        """The stages are asked to hold merged weights, of `version`; returns whether they keep them."""
        assert self._steps.has_nothing_begun
        self.is_under_way = True
        # Not if a node that alone has learnt keeps that number already: requests are pinned to it.
        self._is_kept = self._steps.begin_keeping(version, may_save=True)
        return self._is_kept

    def finish(self, version: int) -> list[Action]:
        """The stages hold merged weights."""
        assert self._steps.has_nothing_begun
        self._steps.version, self.is_under_way = version, False
        return list(self._publishing.applied(version)) if self._is_kept else []

    def cancel(self) -> None:
        """The node closes: whatever its stages answer is of no use."""
        self.is_under_way = False
