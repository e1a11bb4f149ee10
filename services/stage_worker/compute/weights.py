"""The weights of one stage: those that serve, the older ones that microbatches in flight need, and the step.

Serving uses the newest weights, or a version that is kept for it. A training forward uses leaves that share
the newest weights' memory, so that stashing costs nothing, and so does a kept version; only when a step comes
while microbatches are in flight, or the version is kept, is the memory copied, once, and the leaves keep the
old one (copy on write). A backward thus uses exactly the weights of its forward.

Where the newest weights must not move, as a captured CUDA graph reads them where they were (`in_place`), the
leaves are a copy from the start, and so is a version that is kept: a step then changes neither.

The optimizer steps master copies in float32. Where the stage computes in float32 they are the newest weights
themselves; elsewhere those are the masters, rounded, and gradients are summed in float32 over a batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from services.stage_worker.compute.slices import Slices, finish
from services.stage_worker.training.optimizers import OptimizerSettings, build_optimizer, first_state
from services.stage_worker.training.precision import cast_parameters
from shared.errors import LemixError, VersionGoneError
from shared.model.stage import Stage
from shared.schedule import StashingName

Tensors = dict[str, Tensor]


class WeightsVersion:
    """The leaves that all microbatches share that were sent forward under one version."""

    def __init__(self, number: int, memory: Mapping[str, Tensor]) -> None:
        self.number = number
        self.leaves = {name: Parameter(tensor) for name, tensor in memory.items()}
        self.num_in_flight = 0

    def pop_gradients(self) -> Tensors:
        """The gradients that backwards have left on the leaves, which have none then."""
        taken = {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}
        for leaf in self.leaves.values():
            leaf.grad = None
        return taken

    def equals(self, other: "WeightsVersion") -> bool:
        """Whether the weights are the same."""
        return all(torch.equal(leaf, other.leaves[name]) for name, leaf in self.leaves.items())


class StageWeights:
    """Owns the parameters of a stage that training changes. All methods belong to the compute thread."""

    def __init__(
        self,
        stage: Stage,
        optimizer: OptimizerSettings,
        *,
        version: int,
        stashing: StashingName | Literal["none"] = "full",
        dtype: torch.dtype = torch.float32,
        in_place: bool = False,
    ) -> None:
        """From now on the stage computes in `dtype`; its parameters until now become the masters.

        `in_place`: the weights that serve stay where they are, whatever happens.
        """
        self._stage = stage
        self._masters = stage.trainable_tensors()
        cast_parameters(stage, dtype)
        self._newest = stage.trainable_tensors()
        self.version = version
        self._stashing = stashing
        self._in_place = in_place
        self._current: WeightsVersion | None = None
        self._versions: list[WeightsVersion] = []
        """Those that microbatches in flight need, the current one, and those that are kept; oldest first."""
        self._kept: dict[int, WeightsVersion] = {}
        """For serving, by number."""
        self._spare: list[Tensors] = []
        """Memory of versions that nobody needs any more: fresh pages would cost more than the copy."""
        self._gathered: Tensors = {}
        """Gradients of the batch whose backwards run now."""
        self._gradients: dict[str, Tensors] = {}
        """Gradients of batches whose backwards are all done, until their step."""
        self._optimizer_settings = optimizer
        self._optimizer = build_optimizer(optimizer, self._masters.values())

    def to_train(self) -> WeightsVersion:
        """Leaves of the newest weights: a forward runs with them installed, and its graphs keep them."""
        if self._current is None:
            has_own_memory = self._in_place and self._stashing != "none"
            self._current = self._new_version(has_own_memory)
        return self._current

    def forward_done(self, version: WeightsVersion) -> None:
        """A microbatch has run forward with these: they stay as they are until its backward is done."""
        version.num_in_flight += 1

    @contextmanager
    def as_for_training(self) -> Iterator[None]:
        """Run the stage with the newest weights as microbatches have them; nothing is kept for a backward."""
        if self._current is None:
            yield
            return
        with self.installed(self._current):
            yield

    @contextmanager
    def serving(self, number: int | None) -> Iterator[None]:
        """Run the stage with the weights of a kept version; None: the newest.

        Raises VersionGoneError when it is neither kept nor the newest.
        """
        if self.are_in_place(number):
            yield
            return
        if number not in self._kept:
            raise VersionGoneError(f"weights version {number} is gone")
        with self.installed(self._kept[number]):
            yield

    def are_in_place(self, number: int | None) -> bool:
        """Whether a version is served from the newest weights' memory, and not as a kept one."""
        return number is None or (number == self.version and number not in self._kept)

    @contextmanager
    def installed(self, version: WeightsVersion) -> Iterator[None]:
        """Run the stage with that version's leaves."""
        self._install(version.leaves)
        try:
            yield
        finally:
            self._install(self._newest)

    def keep(self) -> bool:
        """Hold on to the weights as they are now, under their version's number, until `release`.

        False: other weights were kept under that number, and are gone now.
        """
        before, now = self._kept.get(self.version), self._version_to_keep()
        self._kept[self.version] = now
        self._retire()
        return before is None or before.equals(now)

    def release(self, number: int) -> None:
        """Serving needs that version no more."""
        self._kept.pop(number, None)
        self._retire()

    def backward_done(self, version: WeightsVersion) -> None:
        """A microbatch of that version has run backward: its gradients count for the batch that runs."""
        if version not in self._versions:
            return  # all training was dropped since its forward
        version.num_in_flight -= 1
        self._gather(version.pop_gradients())
        self._retire()

    def finish_batch(self, batch_id: str) -> Tensors:
        """The gradients, by name, of a batch whose backwards were the latest; they wait for its step."""
        total, self._gathered = self._gathered, {}
        self._gradients[batch_id] = total
        return total

    def gradients(self, batch_id: str) -> Tensors:
        """The gradients of a finished batch; a view, not a copy. KeyError when no step waits for them."""
        return self._gradients[batch_id]

    def replace_gradients(self, batch_id: str, gradients: Tensors) -> None:
        """Let a step on `batch_id`, finished or only a name, use these, which belong to it from now on."""
        self._gradients[batch_id] = gradients

    def add_gradient(self, batch_id: str, name: str, gradient: Tensor) -> None:
        """Add what another stage's copy of a tied parameter has gathered for a finished batch."""
        gradients = self._gradients[batch_id]
        gradients[name] = gradients[name] + gradient  # not in place: the other stage may still read ours

    def squared_norm(self, batch_id: str, *, but: str | None = None) -> float:
        """Sum of the squares of a finished batch's gradients, those of parameter `but` left out."""
        counted = [gradient for name, gradient in self._gradients[batch_id].items() if name != but]
        norms = torch._foreach_norm(counted)
        return sum(norm**2 for norm in torch.stack(norms).tolist()) if norms else 0.0

    def skip(self, batch_id: str) -> None:
        """Drop a finished batch's gradients."""
        del self._gradients[batch_id]

    @property
    def serve_copies(self) -> bool:
        """Whether the weights that serve are not the masters: these may change before those do."""
        return any(self._newest[name] is not master for name, master in self._masters.items())

    def step(self, batch_id: str, learning_rate: float, *, version: int, scale: float = 1.0) -> None:
        """Apply a finished batch's gradients times `scale`; the weights are then of `version`.

        Raises LemixError when `double` stashing would have to keep a third version.
        """
        finish(self.learn(batch_id, learning_rate, scale=scale))
        self.show(version)

    def learn(
        self, batch_id: str, learning_rate: float, *, scale: float = 1.0, num_slices: int = 1
    ) -> Slices[None]:
        """The first part of a step: the masters change, in so many slices at most. Raises as `step`."""
        gradients = self._gradients.pop(batch_id)
        if self._current is not None and self._is_needed(self._current):
            self._stash(self._current)
        self._current = None
        if scale != 1.0:
            torch._foreach_mul_(list(gradients.values()), scale)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for number, names in enumerate(_cut(self._masters, num_slices)):
            if number:
                yield
            for name in names:
                self._masters[name].grad = gradients.get(name)
            self._optimizer.step()
            increment_version(self._masters[name] for name in names)  # a fused step does not count as a write
            self._optimizer.zero_grad(set_to_none=True)

    def show(self, version: int) -> None:
        """The rest of a step: what the masters have learnt serves, as `version`."""
        self._round_masters()
        self._retire()
        self.version = version

    def drop_training(self) -> None:
        """Forget every microbatch in flight and every gradient; kept versions stay."""
        self._versions = [version for version in self._versions if self._is_kept(version)]
        for version in self._versions:
            version.num_in_flight = 0
            version.pop_gradients()
        if self._current not in self._versions:
            self._current = None
        self._gathered = {}
        self._gradients.clear()

    def load(
        self, tensors: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor], *, version: int
    ) -> None:
        """Hold these weights instead, in place; `optimizer_state` as its namesake gives it, or {}.

        Versions that are kept stay as they are.
        """
        self.drop_training()
        if self._current is not None:
            self._stash(self._current)
        self._current = None
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(tensors[name])
        self._round_masters()
        self._load_optimizer({key: value.clone() for key, value in optimizer_state.items()})
        self.version = version

    def replace(
        self, tensors: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor], *, version: int
    ) -> None:
        """Go on from these masters, whose memory belongs to the stage from now on.

        Nothing is copied that may move. Versions in flight, and those that are kept, keep theirs.
        """
        self._current = None
        self._retire()
        self._spare.clear()  # it may lie in the much larger memory of the last ones
        for name, newest in self._newest.items():
            if self._in_place:
                with torch.no_grad():
                    newest.copy_(tensors[name])
            else:
                newest.data = tensors[name].to(newest.dtype)
            if self._masters[name] is not newest:
                self._masters[name].data = tensors[name]
        self._load_optimizer(optimizer_state)
        self.version = version

    def master_tensors(self) -> dict[str, Parameter]:
        """The newest weights as they are learned, in float32; a view, not a copy."""
        return dict(self._masters)

    def optimizer_state(self) -> Tensors:
        """Everything that the optimizer remembers, as `<kind>.<parameter name>`."""
        return {
            f"{kind}.{name}": value
            for name, master in self._masters.items()
            for kind, value in self._optimizer.state.get(master, {}).items()
        }

    def complete_optimizer_state(self) -> Tensors:
        """The same, and for parameters that never had a gradient what the first one would leave."""
        missing = {
            f"{kind}.{name}": value
            for name, master in self._masters.items()
            if not self._optimizer.state.get(master)
            for kind, value in first_state(self._optimizer_settings, master).items()
        }
        return self.optimizer_state() | missing

    def _load_optimizer(self, state: Mapping[str, Tensor]) -> None:
        """The optimizer itself puts each tensor where it wants it, and keeps those that are there."""
        numbers = {name: number for number, name in enumerate(self._masters)}
        by_number: dict[int, Tensors] = {}
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if name in numbers:
                by_number.setdefault(numbers[name], {})[kind] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": by_number, "param_groups": groups})

    def _version_to_keep(self) -> WeightsVersion:
        if self._in_place and self._stashing == "none":
            return self._new_version(has_own_memory=True)
        return self.to_train()

    def _new_version(self, has_own_memory: bool) -> WeightsVersion:
        # `.data` shares memory but not autograd's version counter: the newest may step, leaves stay valid.
        newest = {name: parameter.data for name, parameter in self._newest.items()}
        version = WeightsVersion(self.version, self._copied(newest) if has_own_memory else newest)
        self._versions.append(version)
        return version

    def _copied(self, tensors: Tensors) -> Tensors:
        """A copy, in memory of a retired version where there is some."""
        if not self._spare:
            return {name: tensor.clone() for name, tensor in tensors.items()}
        memory = self._spare.pop()
        return {name: memory[name].copy_(tensor) for name, tensor in tensors.items()}

    def _install(self, parameters: Mapping[str, Parameter]) -> None:
        for name, parameter in parameters.items():
            self._stage.set_parameter(name, parameter)

    def _stash(self, version: WeightsVersion) -> None:
        """Leave the newest weights' memory to `version`, unless it has its own, and go on in other memory."""
        older = [each.number for each in self._versions if each.num_in_flight and each is not version]
        if older and self._stashing == "double":
            raise LemixError(
                f"a step after version {version.number} while microbatches of version {older[0]} are in "
                "flight: stashing=double keeps two versions"
            )
        if not self._in_place:
            copies = self._copied({name: parameter.data for name, parameter in self._newest.items()})
            for name, parameter in self._newest.items():
                parameter.data = copies[name]

    def _round_masters(self) -> None:
        """Into the weights that serve, where these are not the masters themselves."""
        with torch.no_grad():
            for name, master in self._masters.items():
                if (newest := self._newest[name]) is not master:
                    newest.copy_(master)

    def _gather(self, gradients: Tensors) -> None:
        """Add to those of the batch whose backwards run now."""
        for name, gradient in gradients.items():
            held = self._gathered.get(name)
            summed = gradient.to(self._masters[name].dtype) if held is None else held.add_(gradient)
            self._gathered[name] = summed

    def _retire(self) -> None:
        """Let go of versions that no microbatch in flight needs; keep the memory of those alone in it."""
        for version in [each for each in self._versions if not self._is_in_use(each)]:
            self._versions.remove(version)
            # A step leaves the memory of a version that it does not stash to the next one.
            others = (self._newest, *(each.leaves for each in self._versions))
            if _owns_memory(version) and not any(_is_same_memory(version.leaves, other) for other in others):
                self._spare.append({name: leaf.data for name, leaf in version.leaves.items()})

    def _is_in_use(self, version: WeightsVersion) -> bool:
        return version.num_in_flight > 0 or version is self._current or self._is_kept(version)

    def _is_needed(self, version: WeightsVersion) -> bool:
        """Whether a step must leave it its memory."""
        is_stashed = version.num_in_flight > 0 and self._stashing != "none"
        return is_stashed or self._is_kept(version)

    def _is_kept(self, version: WeightsVersion) -> bool:
        return self._kept.get(version.number) is version


def _cut(tensors: Mapping[str, Tensor], num_parts: int) -> list[list[str]]:
    """The names in so many runs of nearly as many values each, or fewer."""
    total, ends = sum(map(Tensor.numel, tensors.values())), accumulate(map(Tensor.numel, tensors.values()))
    part_of = {name: (end - 1) * num_parts // total for name, end in zip(tensors, ends, strict=True)}
    return [list(names) for _, names in groupby(tensors, part_of.__getitem__)]


def _is_same_memory(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(tensor.data_ptr() == other[name].data_ptr() for name, tensor in one.items())


def _owns_memory(version: WeightsVersion) -> bool:
    """Whether nothing else lies in it: after a merge weights are parts of one larger piece."""
    leaves = version.leaves.values()
    return all(leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in leaves)
