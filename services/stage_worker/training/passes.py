"""Passes of a microbatch through a stage: forward part by part, and backward from the last part to the first.

The outputs of each part go on as a leaf, so that each part has a graph of its own; the gradient that later
graphs leave on the leaf is that of the outputs. The head, which may cost as much as many layers, runs on some
of its rows after the others.

Shape letters: T rows of the microbatch, H hidden size, R rows that have a label.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from services.stage_worker.compute.slices import Slices
from services.stage_worker.compute.weights import StageWeights, WeightsVersion
from shared.model.attention import PackedSegments
from shared.model.stage import Stage


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The rows of a microbatch as every stage takes them."""

    positions_T: Tensor
    segments: PackedSegments
    labelled_R: Tensor
    labels_R: Tensor


@dataclass(frozen=True, slots=True)
class Graph:
    """One part's share of a forward."""

    outputs: Tensor
    leaf: Tensor
    """The same values, as later graphs take them."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward, to be used up by its backward."""

    inputs: Tensor
    graphs: list[Graph]

    @property
    def outputs(self) -> Tensor:
        """Those of the stage, without their graph."""
        return self.graphs[-1].leaf.detach()


class Passes:
    """Cuts passes through a stage into slices. All methods belong to the compute thread."""

    def __init__(self, parts: Sequence[Stage], weights: StageWeights) -> None:
        """`parts`: see `shared.model.cutting`."""
        is_last = parts[-1].layers.is_last
        self._layers = parts[:-1] if is_last else parts
        self._head = parts[-1] if is_last else None
        self._weights = weights
        self._num_of_head = _num_slices_of_head(parts) if is_last else 0

    @property
    def num_slices(self) -> int:
        """Slices of a pass."""
        return len(self._layers) + self._num_of_head

    def forward(
        self,
        version: WeightsVersion,
        inputs: Tensor,
        rows: PackedRows,
        loss: Callable[[Tensor], Tensor],
        saving: Callable[[], AbstractContextManager[object]],
    ) -> Slices[Pass]:
        """Run token ids [T] or hidden states [T, H] through the stage, with the weights of a version.

        `loss`: makes of the labels' log-probabilities [R], in nats, what the last stage puts out.
        `saving`: where graphs keep what their backward needs.
        """
        leaf, graphs = _as_leaf(inputs), list[Graph]()
        for part in self._layers:
            if graphs:
                yield
            with self._weights.installed(version), saving():
                outputs = part.forward(leaf, rows.positions_T, rows.segments)
            leaf = _as_leaf(outputs.detach())
            graphs.append(Graph(outputs, leaf))
        if self._head is None:
            return Pass(inputs, graphs)
        logprobs = []
        for labelled, labels in zip(*map(self._cut, (rows.labelled_R, rows.labels_R)), strict=True):
            if graphs:
                yield
            with self._weights.installed(version), saving():
                logits = self._head.forward(leaf, rows.positions_T, rows.segments, labelled)
                outputs = -functional.cross_entropy(logits.float(), labels, reduction="none")
            logprobs.append(_as_leaf(outputs.detach()))
            graphs.append(Graph(outputs, logprobs[-1]))
        with saving():
            total = loss(torch.cat(logprobs))
        return Pass(inputs, [*graphs, Graph(total, total.detach())])

    def backward(self, passed: Pass, gradient: Tensor | None) -> Slices[Tensor | None]:
        """Use a forward up, with the gradient of its outputs; None where they are a scalar.

        Returns the gradient [T, H] of the stage's inputs; None where these are token ids.
        """
        graphs = passed.graphs
        graphs[-1].leaf.grad = gradient
        while graphs:
            graph = graphs.pop()
            torch.autograd.backward(graph.outputs, graph.leaf.grad)
            if graphs and graph.outputs.dim() > 0:  # the loss on its own takes no time
                yield
        return passed.inputs.grad

    def _cut(self, rows_R: Tensor) -> tuple[Tensor, ...]:
        return rows_R.chunk(self._num_of_head)


def _as_leaf(inputs: Tensor) -> Tensor:
    return inputs.requires_grad_() if inputs.is_floating_point() else inputs


def _num_slices_of_head(parts: Sequence[Stage]) -> int:
    """As many as make each cost about what a part of the layers does, by the weights that a row meets."""
    if len(parts) == 1:
        return 1
    of_layers: int = sum(parameter.numel() for parameter in parts[-2].model.parameters())
    of_head: int = parts[-1].model.get_output_embeddings().weight.numel()
    return max(1, round(of_head / of_layers))
