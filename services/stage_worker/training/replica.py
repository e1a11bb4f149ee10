"""A stage's tensors in a mean with the same stage of other nodes: the copies, and the use of their mean."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.training.outer import OuterState, outer_state, outer_step
from shared.errors import LemixError
from shared.messages.weights import OuterStep
from shared.tensors.flat import FlatTensors


@dataclass(slots=True)
class Copied:
    """A stage's tensors for a mean, and afterwards the mean."""

    tensors: FlatTensors
    devices: dict[str, torch.device] = field(default_factory=dict)
    """Where each tensor of an optimizer's state belongs."""
    outer: OuterState | None = None
    """After the outer step, where one was made."""


class Replica:
    """The stage's weights, optimizer state and gradients as one of several. With all of an optimizer's state
    averaged too, merged nodes are the same to the last bit, and a checkpoint of one is one of all.

    `copy_state` and `make_outer_step` may run beside the compute thread, to which all other methods belong.
    """

    def __init__(
        self, weights: StageWeights, device: torch.device, saved: Mapping[str, Tensor], *, is_outer: bool
    ) -> None:
        """`is_outer`: outer steps may be asked for. `saved`: the optimizer's state in the checkpoint."""
        self._weights = weights
        self._device = device
        self._is_outer = is_outer
        self._gradients: FlatTensors | None
        self.restored(saved)

    def restored(self, saved: Mapping[str, Tensor]) -> None:
        """The stage has just loaded the weights of a merge, or those that all nodes begin with."""
        self._outer = outer_state(self._weights.master_tensors(), saved) if self._is_outer else None
        self._gradients = None  # a mean that others have left may still be writing there

    def named_state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold beside the weights and their optimizer's state."""
        return self._outer.named() if self._outer else {}

    def copy_state(self) -> Copied:
        """Weights, and all that their optimizer remembers. Serving goes on meanwhile, training must not."""
        weights, optimizer = self._weights.master_tensors(), self._weights.complete_optimizer_state()
        # In an order that is the same on all nodes; single numbers last, for the sake of alignment.
        ordered = sorted(optimizer.items(), key=lambda item: (-item[1].numel(), item[0]))
        state = {**weights, **dict(ordered)}
        flat = FlatTensors(state, self._device)
        flat.copy_from(state)
        return Copied(flat, {key: value.device for key, value in optimizer.items()})

    def make_outer_step(self, mean: Copied, step: OuterStep) -> None:
        """Put the weights after the outer step in place of their mean. The stage itself stays as it is.

        Raises LemixError when the stage was not told to keep what it needs.
        """
        if self._outer is None:
            raise LemixError("an outer step needs merge=outer on the stages, too")
        mean.outer = outer_step(self._outer, self._weights_in(mean), step)

    def adopt_state(self, mean: Copied, *, version: int) -> None:
        """Go on from the mean, whose memory becomes the stage's own."""
        state = {key: mean.tensors.views[key].to(device) for key, device in mean.devices.items()}
        self._weights.replace(self._weights_in(mean), state, version=version)
        self._outer = mean.outer or self._outer

    def copy_gradients(self, batch_id: str) -> Copied:
        """Gathered gradients of a batch; zeros where `batch_id` is empty."""
        gradients = self._weights.gradients(batch_id) if batch_id else {}
        if self._gradients is None:
            self._gradients = FlatTensors(self._weights.master_tensors(), self._device)
        self._gradients.flat.zero_()
        for name, gradient in gradients.items():
            self._gradients.views[name].copy_(gradient)
        return Copied(self._gradients)

    def adopt_gradients(self, mean: Copied, batch_id: str) -> None:
        """Let the batch's step be one on the mean, whose memory it uses."""
        self._weights.replace_gradients(batch_id, dict(mean.tensors.views))

    def _weights_in(self, mean: Copied) -> dict[str, Tensor]:
        return {name: mean.tensors.views[name] for name in self._weights.master_tensors()}
