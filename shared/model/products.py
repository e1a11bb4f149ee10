"""Matrix products of few rows on the CPU, with weights laid out beforehand for them.

A plain product of a few rows is slow. For 2 rows and more oneDNN takes weights that it has laid out itself
("packed") in about half of the time where they are large; for a single row a transposed copy mostly takes
less than those, down to a half. docs/benchmarks has the shapes and the exceptions.

The packing operations are private to torch: `is_possible` says whether they are here.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shared.model.lora import base_module, low_rank_of

Source: TypeAlias = tuple[Tensor | None, int]
"""A weight and the number of changes that torch has counted."""

_PACKED_FOR_ROWS: Final = 8
_PATIENCE_CALLS: Final = 2
"""Forwards for which fresh weights last before their copies are made: a step may change them at once."""


def is_possible() -> bool:
    """Whether torch has what packed products need."""
    operations = ("_reorder_linear_weight", "_linear_pointwise")
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch is untyped here
    return has_onednn and all(hasattr(torch.ops.mkldnn, name) for name in operations)


@dataclass(frozen=True, slots=True)
class Copies:
    """Two copies of a weight [outputs, inputs]: for a single row, and for more."""

    sources: tuple[Source, ...]
    transposed: Tensor
    packed: Tensor
    bias: Tensor | None
    widths: tuple[int, ...]
    """Outputs of each of the modules."""

    def product(self, inputs: Tensor) -> Tensor:
        """The product [..., outputs]."""
        if inputs.numel() > inputs.size(-1):
            several: Tensor = torch.ops.mkldnn._linear_pointwise(
                inputs, self.packed, self.bias, "none", [], ""
            )
            return several
        single = inputs.flatten(0, -2) @ self.transposed
        if self.bias is not None:
            single += self.bias
        return single.view(*inputs.shape[:-1], single.size(-1))


def _copies(sources: tuple[Source, ...], weights: Sequence[Tensor], bias: Tensor | None) -> Copies:
    """Copies of `weights`, each [outputs, inputs], one after the other."""
    together = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    return Copies(
        sources,
        transposed=together.t().contiguous(),
        packed=torch.ops.mkldnn._reorder_linear_weight(together.contiguous(), _PACKED_FOR_ROWS),
        bias=bias,
        widths=tuple(weight.size(0) for weight in weights),
    )


class Product:
    """The product with the weights of one or more linear modules that take the same input."""

    def __init__(
        self, modules: Sequence[nn.Module], workshop: "Workshop", patience_calls: int = _PATIENCE_CALLS
    ) -> None:
        """`patience_calls`: forwards with fresh weights before their copies are begun."""
        bases = [base_module(module) for module in modules]
        self._tables = [(base._parameters, isinstance(base, Conv1D)) for base in bases]
        self._adapters = [low_rank_of(module) for module in modules]
        self._is_adapted = any(self._adapters)
        self._workshop = workshop
        self._patience_calls = patience_calls
        self._seen: tuple[Source, ...] = ()
        """Fresh weights, which `_calls` forwards in a row have found."""
        self._calls = 0
        self._copies: Copies | None = None
        self._making: Future[Copies] | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """The product [..., sum of outputs]; only after `ready()`."""
        assert self._copies is not None
        product = self._copies.product(inputs)
        if self._is_adapted:
            self._add_adapters(product, inputs, self._copies.widths)
        return product

    def _add_adapters(self, product: Tensor, inputs: Tensor, widths: Sequence[int]) -> None:
        rows = inputs.flatten(0, -2)
        parts = product.flatten(0, -2).split_with_sizes(list(widths), 1)
        for part, adapter in zip(parts, self._adapters, strict=True):
            if adapter is not None:
                adapter.add_to(part, rows)

    def ready(self) -> bool:
        """Whether the copies are those of the modules' weights; has them made once these have lasted."""
        if self.is_current:
            self._calls = 0
            return True
        if self._making is not None:
            if not self._making.done():
                return False
            self._copies, self._making = self._making.result(), None
            return self.ready()
        if not self._are_in_place(self._seen):
            self._seen, self._calls = self._sources(), 0
        self._calls += 1
        if self._calls > self._patience_calls:
            # Read now: while the thread works, the modules may run with the weights of another version.
            self._making = self._workshop.submit(partial(self._copied, self._seen, self._biases()))
        return False

    def _are_in_place(self, sources: tuple[Source, ...]) -> bool:
        for (table, _), (source, version) in zip(self._tables, sources, strict=False):
            weight = table["weight"]
            if weight is not source or weight is None or weight._version != version:
                return False
        return bool(sources)

    def prepare(self) -> None:
        """Copy the weights now in the modules, at once."""
        self._copies = self._copied(self._sources(), self._biases())

    def _copied(self, sources: tuple[Source, ...], biases: Sequence[Tensor]) -> Copies:
        """Copy these weights; when they change meanwhile, the copies are not theirs any more."""
        weights = [
            weight.detach().t() if is_transposed else weight.detach()
            for (weight, _), (_, is_transposed) in zip(sources, self._tables, strict=True)
            if weight is not None
        ]
        return _copies(sources, weights, torch.cat(list(biases)) if biases else None)

    @property
    def is_current(self) -> bool:
        """Whether the copies are those of the weights now in the modules; starts nothing."""
        return self._copies is not None and self._are_in_place(self._copies.sources)

    def hand_over(self) -> None:
        """Note that the weights now in the modules have the values that the copies were made of."""
        assert self._copies is not None
        self._copies = replace(self._copies, sources=self._sources())

    def invalidate(self) -> None:
        """Forget the copies, and those that are being made: their weights may change meanwhile."""
        self._copies = self._making = None
        self._seen = ()

    @property
    def layouts(self) -> tuple[Tensor, ...]:
        """The copies that there are."""
        copies = self._copies
        return (copies.transposed, copies.packed) if copies else ()

    def _biases(self) -> list[Tensor]:
        biases = [bias.detach() for table, _ in self._tables if (bias := table.get("bias")) is not None]
        assert len(biases) in (0, len(self._tables))
        return biases

    def _sources(self) -> tuple[Source, ...]:
        weights = [table["weight"] for table, _ in self._tables]
        return tuple((weight, -1 if weight is None else weight._version) for weight in weights)


class Workshop:
    """Makes the copies of one stage's weights, one after the other, in a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="packing")

    def submit(self, work: Callable[[], Copies]) -> Future[Copies]:
        """Do it in the thread."""
        return self._thread.submit(work)
