"""The optimizers that a stage steps with, by name. Why these two: docs/training.md."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import NAdam, Optimizer

from services.stage_worker.settings import OptimizerName


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Settings that every optimizer here has; the learning rate comes with each step."""

    name: OptimizerName = "adamw"
    beta1: float | None = None
    """Momentum; None: 0.9 of `adamw`, 0.99 of `nadamw`."""
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled from the gradient in both."""


def build_optimizer(settings: OptimizerSettings, parameters: Iterable[Parameter]) -> Optimizer:
    """The optimizer that `settings` names; each step sets its learning rate first."""
    return _BUILDERS[settings.name](settings, parameters)


def first_state(settings: OptimizerSettings, parameter: Parameter) -> dict[str, Tensor]:
    """The optimizer's state for `parameter` when its first gradient was zero."""
    stand_in = Parameter(torch.zeros_like(parameter))
    stand_in.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(settings, [stand_in])
    optimizer.step()
    return dict(optimizer.state[stand_in])


def _adamw(settings: OptimizerSettings, parameters: Iterable[Parameter]) -> Optimizer:
    return torch.optim.AdamW(
        parameters,
        betas=(0.9 if settings.beta1 is None else settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _nadamw(settings: OptimizerSettings, parameters: Iterable[Parameter]) -> Optimizer:
    """The look-ahead of Nesterov's momentum stands for the steps that a delayed gradient has not seen.

    With the momentum of Ajanthan et al., Nesterov Method for Asynchronous Pipeline Parallel Optimization
    (ICML 2025, arXiv 2505.01099).
    """
    return NAdam(
        parameters,
        betas=(0.99 if settings.beta1 is None else settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        decoupled_weight_decay=True,
        foreach=True,
    )


_BUILDERS: Mapping[OptimizerName, Callable[[OptimizerSettings, Iterable[Parameter]], Optimizer]] = {
    "adamw": _adamw,
    "nadamw": _nadamw,
}
