"""One process whose weights are as old, stage by stage, as those that a pipeline's forwards met."""

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from tests.support.plain import Plain, State
from tests.support.saving import name_in_stages
from tests.support.training import ADAMW, Batch, loss_of, num_labels

DELAYED_TOLERANCE = 5e-6
"""Between its weights and a pipeline's. Which weights a microbatch meets is up to the stages' timing, and
with it the rounding: 1.24e-6 was seen."""
HEAD = "lm_head.weight"

Versions = Mapping[tuple[int, str, int], int]
"""(stage, batch, microbatch) -> how many steps the weights of its forward contained."""


def stage_of_tensors(checkpoint: Path) -> dict[str, int]:
    """Which stage trains each tensor, by its name in stages; of a tied one the first that does."""
    files = [load_file(path) for path in sorted(checkpoint.glob("optimizer-*.safetensors"))]
    return {
        name.removeprefix("exp_avg."): stage
        for stage in reversed(range(len(files)))
        for name in files[stage]
        if name.startswith("exp_avg.")
    }


class Reference(Plain):
    """The plain loop over single examples through the unsplit model."""

    def __init__(
        self,
        model: Any,
        stage_of: Mapping[str, int],
        *,
        epsilon: float = ADAMW["optimizer_epsilon"],
        max_gradient_norm: float = inf,
    ) -> None:
        """`stage_of`: as `stage_of_tensors` has it."""
        super().__init__(model, epsilon=epsilon)
        self._stage_of = {
            name: stage_of[name_in_stages(name)]
            for name, tensor in model.named_parameters()
            if tensor.requires_grad
        }
        self._num_stages = 1 + max(stage_of.values())
        self._max_gradient_norm = max_gradient_norm
        head = model.get_output_embeddings().weight
        self._tied = next(
            (name for name, each in self.parameters.items() if each is head and name != HEAD), ""
        )
        self._history = [self.weights()]
        self.losses: list[float] = []
        self.norms: list[float] = []

    def learn(self, batches: Mapping[str, Batch], met: Versions | None = None) -> None:
        """A step on each batch, in their order. Without `met` every forward meets the newest weights."""
        for batch_id, batch in batches.items():
            self.losses.append(0.0)
            gradients = {name: torch.zeros_like(each) for name, each in self.parameters.items()}
            newest, stages = len(self._history) - 1, range(self._num_stages)
            for index, examples in enumerate(batch):
                old = self._weights_of([met[stage, batch_id, index] if met else newest for stage in stages])
                loss = loss_of(self.model, old, examples, num_labels(batch), tie_weights=False)
                for name, gradient in zip(old, torch.autograd.grad(loss, list(old.values())), strict=True):
                    gradients[self._tied if self._tied and name == HEAD else name_in_stages(name)] += gradient
                self.losses[-1] += loss.item()
            self.step(list(gradients.values()))
            self._history.append(self.weights())

    def step(self, gradients: Sequence[Tensor]) -> None:
        parameters = list(self.parameters.values())
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.norms.append(clip_grad_norm_(parameters, self._max_gradient_norm).item())
        super().step(gradients)

    def hold(self, state: State) -> None:
        super().hold(state)
        self._history = [self.weights()]

    def _weights_of(self, versions: Sequence[int]) -> dict[str, Tensor]:
        """The weights of each stage's version; a tied one is also on the last stage, of its own age."""

        def old(name: str, stage: int) -> Tensor:
            return self._history[versions[stage]][name_in_stages(name)].clone().requires_grad_()

        found = {name: old(name, stage) for name, stage in self._stage_of.items()}
        if self._tied:
            found[HEAD] = old(self._tied, self._num_stages - 1)
        return found
