"""The weights of one stage: those that serve, the older ones that microbatches in flight need, and the step.

Serving uses the newest weights, or a version that is kept for it. A training forward uses leaves that share
the newest weights' memory, so that stashing costs nothing, and so does a kept version; only when a step comes
while microbatches are in flight, or the version is kept, is the memory copied, once, and the leaves keep the
old one (copy on write). A backward thus uses exactly the weights of its forward.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from shared.errors import VersionGoneError
from shared.model.stage import Stage

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWSettings:
    """Of torch.optim.AdamW; the learning rate comes with each step."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0


class WeightsVersion:
    """What the microbatches that were sent forward under one version share."""

    def __init__(self, number: int, newest: Mapping[str, Parameter]) -> None:
        self.number = number
        # `.data` shares memory but not autograd's version counter: the newest may step, these stay valid.
        self.leaves = {name: Parameter(parameter.data) for name, parameter in newest.items()}
        self.num_in_flight = 0


class StageWeights:
    """Owns the parameters of a stage. All methods belong to the compute thread."""

    def __init__(self, stage: Stage, settings: AdamWSettings, *, version: int) -> None:
        self._stage = stage
        self._newest = stage.named_tensors()
        self.version = version
        self._current: WeightsVersion | None = None
        self._versions: list[WeightsVersion] = []
        """Those whose leaves may hold gradients, oldest first; and those that are kept."""
        self._kept: dict[int, WeightsVersion] = {}
        """For serving, by number."""
        self._spare: list[Tensors] = []
        """Memory of versions that nobody needs any more: fresh pages would cost more than the copy."""
        self._gathered: Tensors = {}
        """Gradients of the batch whose backwards run now, from versions that are gone already."""
        self._gradients: dict[str, Tensors] = {}
        """Of batches whose backwards are all done, until their step."""
        self._optimizer = torch.optim.AdamW(
            self._newest.values(),
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    @contextmanager
    def training_forward(self) -> Iterator[WeightsVersion]:
        """Run the stage with leaves of the newest weights; graphs recorded inside keep them."""
        version = self._begin_version()
        self._install(version.leaves)
        try:
            yield version
        finally:
            self._install(self._newest)
        version.num_in_flight += 1

    @contextmanager
    def serving(self, number: int | None) -> Iterator[None]:
        """Run the stage with the weights of a kept version; None: the newest.

        Raises VersionGoneError when it is neither kept nor the newest.
        """
        if number is None or (number == self.version and number not in self._kept):
            yield
            return
        if number not in self._kept:
            raise VersionGoneError(f"weights version {number} is gone")
        self._install(self._kept[number].leaves)
        try:
            yield
        finally:
            self._install(self._newest)

    def keep(self) -> None:
        """Hold on to the weights as they are now, under their version's number, until `release`."""
        self._kept[self.version] = self._begin_version()

    def release(self, number: int) -> None:
        """Serving needs that version no more."""
        self._kept.pop(number, None)
        self._retire()

    def backward_done(self, version: WeightsVersion) -> None:
        """A microbatch of that version has run backward."""
        version.num_in_flight -= 1

    def finish_batch(self, batch_id: str) -> Tensors:
        """Collect the gradients of a batch, whose backwards were the latest; returns them by name."""
        self._gather()
        self._retire()
        total, self._gathered = self._gathered, {}
        self._gradients[batch_id] = total
        return total

    def add_gradient(self, batch_id: str, name: str, gradient: Tensor) -> None:
        """Add what another stage's copy of a tied parameter has gathered for a finished batch."""
        self._gradients[batch_id][name].add_(gradient)

    def squared_norm(self, batch_id: str, *, but: str | None = None) -> float:
        """Sum of the squares of a finished batch's gradients, those of parameter `but` left out."""
        counted = [gradient for name, gradient in self._gradients[batch_id].items() if name != but]
        norms = torch._foreach_norm(counted)
        return sum(norm.item() ** 2 for norm in norms)

    def skip(self, batch_id: str) -> None:
        """Drop a finished batch's gradients."""
        del self._gradients[batch_id]

    def step(self, batch_id: str, learning_rate: float, *, version: int, scale: float = 1.0) -> None:
        """Apply a finished batch's gradients times `scale`; the weights are then of `version`."""
        gradients = self._gradients.pop(batch_id)
        if self._current is not None and (self._current.num_in_flight or self._is_kept(self._current)):
            self._move_newest_to_other_memory()
        self._current = None
        if scale != 1.0:
            torch._foreach_mul_(list(gradients.values()), scale)
        for name, parameter in self._newest.items():
            parameter.grad = gradients.get(name)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._gather()  # of later batches, whose backwards may have begun while this one waited to step
        self._retire()
        self.version = version

    def drop_training(self) -> None:
        """Forget every microbatch in flight and every gradient."""
        self._current = None
        self._versions.clear()
        self._gathered = {}
        self._gradients.clear()

    def load(
        self, tensors: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor], *, version: int
    ) -> None:
        """Hold these weights instead, in place; `optimizer_state` as its namesake gives it, or {}."""
        self.drop_training()
        self._kept.clear()
        with torch.no_grad():
            for name, parameter in self._newest.items():
                parameter.copy_(tensors[name])
        self._optimizer.state.clear()
        for key, value in optimizer_state.items():
            kind, _, name = key.partition(".")
            if name in self._newest:
                parameter = self._newest[name]
                self._optimizer.state[parameter][kind] = value.to(parameter.device, copy=True)
        self.version = version

    def optimizer_state(self) -> Tensors:
        """Everything that AdamW remembers, as `<kind>.<parameter name>`."""
        return {
            f"{kind}.{name}": value
            for name, parameter in self._newest.items()
            for kind, value in self._optimizer.state.get(parameter, {}).items()
        }

    def _begin_version(self) -> WeightsVersion:
        if self._current is None:
            self._current = WeightsVersion(self.version, self._newest)
            self._versions.append(self._current)
        return self._current

    def _install(self, parameters: Mapping[str, Parameter]) -> None:
        for name, parameter in parameters.items():
            self._stage.set_parameter(name, parameter)

    def _move_newest_to_other_memory(self) -> None:
        memory = self._spare.pop() if self._spare else {}
        for name, parameter in self._newest.items():
            copy = memory[name].copy_(parameter.data) if memory else parameter.data.clone()
            parameter.data = copy

    def _gather(self) -> None:
        """Take the gradients out of all leaves."""
        total = self._gathered
        for version in self._versions:
            for name, leaf in version.leaves.items():
                if leaf.grad is not None:
                    total[name] = total[name].add_(leaf.grad) if name in total else leaf.grad
                    leaf.grad = None

    def _retire(self) -> None:
        """Let go of versions that no microbatch in flight needs; keep the memory of those that own it."""
        kept = []
        for version in self._versions:
            if version.num_in_flight or version is self._current or self._is_kept(version):
                kept.append(version)
            elif not self._shares_memory(version):
                self._spare.append({name: leaf.data for name, leaf in version.leaves.items()})
        self._versions = kept

    def _is_kept(self, version: WeightsVersion) -> bool:
        return self._kept.get(version.number) is version

    def _shares_memory(self, version: WeightsVersion) -> bool:
        return all(leaf.data_ptr() == self._newest[name].data_ptr() for name, leaf in version.leaves.items())
