"""The outer optimizer of DiLoCo (arXiv 2311.08105): a step towards the mean of the nodes' weights.

Every node has the same weights after a merge, the same momentum and the same mean, and makes the same step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.messages.weights import OuterStep

MOMENTUM = "outer_momentum"
"""The kind of its state in checkpoints, before the parameter's name."""


@dataclass(frozen=True, slots=True)
class OuterState:
    """The tensors that the next outer step needs, by parameter."""

    weights: dict[str, Tensor]
    """As they were after the last merge."""
    momentum: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint of a merge must hold beside its weights."""
        return {f"{MOMENTUM}.{name}": value for name, value in self.momentum.items()}


def without_outer(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An optimizer's state in a checkpoint, without that of the outer one."""
    return {key: value for key, value in saved.items() if key.partition(".")[0] != MOMENTUM}


def outer_state(weights: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> OuterState:
    """Build the state from copies of the weights after a merge; `saved` is its checkpoint's, or empty."""
    return OuterState(
        {name: weight.detach().clone() for name, weight in weights.items()},
        {
            name: torch.zeros_like(weight)
            if (momentum := saved.get(f"{MOMENTUM}.{name}")) is None
            else momentum.to(weight.device)
            for name, weight in weights.items()
        },
    )


@torch.no_grad()
def outer_step(state: OuterState, mean: Mapping[str, Tensor], step: OuterStep) -> OuterState:
    """Overwrite `mean` by the weights after the step, and return the state then; `state` stays.

    With Nesterov's momentum: delta = w - mean, m = mu m + delta, w = w - lr (delta + mu m).
    """
    after = OuterState({}, {})
    for name, weight in mean.items():
        delta = state.weights[name] - weight
        momentum = delta.add(state.momentum[name], alpha=step.momentum)
        weight.copy_(delta.add_(momentum, alpha=step.momentum).mul_(-step.learning_rate))
        weight.add_(state.weights[name])
        after.weights[name], after.momentum[name] = weight.clone(), momentum
    return after
