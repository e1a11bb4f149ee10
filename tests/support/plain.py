"""One process with the whole model, in plain torch: what nodes that share their weights are compared with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.saving import name_in_stages
from tests.support.training import Batch, adamw, loss_of, num_labels

State = dict[str, Tensor]
"""Trained weights by their names in stages, and the optimizer's state as `<kind>.<name>`."""


class Plain:
    """Steps what trains of `model`, in float32; each microbatch runs with all its weights in `dtype`."""

    def __init__(self, model: Any, *, epsilon: float, dtype: torch.dtype = torch.float32) -> None:
        self._model, self._dtype = model, dtype
        self.parameters: State = {
            name_in_stages(name): each for name, each in model.named_parameters() if each.requires_grad
        }
        self._optimizer = adamw(self.parameters.values())
        self._optimizer.param_groups[0]["eps"] = epsilon

    def gradients(self, batch: Batch) -> list[Tensor]:
        loss = torch.stack([self._loss(examples, num_labels(batch)) for examples in batch]).sum()
        return list(torch.autograd.grad(loss, list(self.parameters.values())))

    def step(self, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()

    def train(self, batch: Batch) -> None:
        self.step(self.gradients(batch))

    def weights(self) -> State:
        """A copy."""
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def state(self) -> State:
        """A copy, in the names of checkpoints."""
        optimizer = {
            f"{kind}.{name}": value.clone()
            for name, parameter in self.parameters.items()
            for kind, value in self._optimizer.state[parameter].items()
        }
        return {name: value.cpu() for name, value in (self.weights() | optimizer).items()}

    def hold(self, state: State) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = state[name].clone()
            for kind, value in self._optimizer.state[parameter].items():
                value.copy_(state[f"{kind}.{name}"])

    def _loss(self, examples: list[list[int]], labels: int) -> Tensor:
        whole = {name: each.to(self._dtype) for name, each in self._model.named_parameters()}
        return loss_of(self._model, whole, examples, labels)


def mean(states: Sequence[State], shares: Sequence[float]) -> State:
    def weighted(name: str) -> list[Tensor]:
        return [state[name] * share for state, share in zip(states, shares, strict=True)]

    return {name: torch.stack(weighted(name)).sum(dim=0) for name in states[0]}


def assert_identical(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
