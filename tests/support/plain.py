"""One process with the whole model, in plain torch: what nodes that share their weights are compared with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared.messages.weights import OuterStep
from tests.support.saving import name_in_stages
from tests.support.training import Batch, adamw, loss_of, num_labels

EPSILON = 1e-2
"""A rounding error of a gradient moves a weight by learning rate / epsilon of it at most."""
OUTER = OuterStep(learning_rate=0.7, momentum=0.9)

State = dict[str, Tensor]
"""Trained weights by their names in stages, and the optimizer's state as `<kind>.<name>`."""


class Plain:
    """Steps what trains of `model`, in float32; each microbatch runs with all its weights in `dtype`."""

    def __init__(self, model: Any, *, dtype: torch.dtype = torch.float32, epsilon: float = EPSILON) -> None:
        self.model, self._dtype = model, dtype
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
        """Go on from there; a state of weights alone is one before the first step."""
        for name, parameter in self.parameters.items():
            parameter.data = state[name].clone()
            keys = {kind: f"{kind}.{name}" for kind in ("step", "exp_avg", "exp_avg_sq")}
            self._optimizer.state[parameter] = {
                kind: state[key].clone() for kind, key in keys.items() if key in state
            }

    def _loss(self, examples: list[list[int]], labels: int) -> Tensor:
        whole = {name: each.to(self._dtype) for name, each in self.model.named_parameters()}
        return loss_of(self.model, whole, examples, labels)


def mean(states: Sequence[State], shares: Sequence[float]) -> State:
    def weighted(name: str) -> list[Tensor]:
        return [state[name] * share for state, share in zip(states, shares, strict=True)]

    return {name: torch.stack(weighted(name)).sum(dim=0) for name in states[0]}


def diloco(state: State, momentum: State, merged: State) -> State:
    """A round of DiLoCo as its paper writes it: Nesterov's SGD of torch on what the mean has moved.

    `momentum` is brought up to date.
    """
    after = dict(merged)
    for name in momentum:
        parameter = torch.nn.Parameter(state[name].clone())
        optimizer = torch.optim.SGD(
            [parameter], lr=OUTER.learning_rate, momentum=OUTER.momentum, nesterov=True
        )
        optimizer.state[parameter]["momentum_buffer"] = momentum[name]
        parameter.grad = state[name] - merged[name]
        optimizer.step()
        after[name] = parameter.detach()
        after[f"outer_momentum.{name}"] = momentum[name].clone()
    return after


def assert_identical(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def is_weight(name: str) -> bool:
    return name.startswith("model.") or name == "lm_head.weight"


def assert_close(
    got: State, expected: State, *, of_weights: float = 1e-6, of_gradients: float = 1e-5
) -> None:
    """Within these, what is remembered of gradients within the second, for they are larger."""
    assert got.keys() >= expected.keys()
    for name, tensor in expected.items():
        tolerance = of_weights if is_weight(name) else of_gradients
        torch.testing.assert_close(
            got[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
