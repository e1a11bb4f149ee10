"""Takes from a Hugging Face model the modules that a run of its layers does without.

So is a stage cut out of a model before it is loaded, and so is a loaded stage cut into parts. Each part is
a stage behind the one before it: hidden states in, hidden states or logits out.
"""

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UnsupportedModelError
from shared.model.attention import PackedSegments
from shared.model.partition import LayerRange
from shared.model.stage import Stage


def cut(stage: Stage, num_parts: int) -> tuple[Stage, ...]:
    """The stage as so many stages of nearly as many layers each, which share its modules.

    At the last stage one of the head alone comes behind them. They have no parameters of their own: what is
    put in place in the stage is in place in them. One part, the stage itself, where that is asked for or the
    model does not compute the same in parts.
    """
    if num_parts == 1:
        return (stage,)
    own = stage.layers
    cuts = [own.first + own.num_layers * part // num_parts for part in range(num_parts + 1)]
    spans = [*pairwise(cuts), *([(own.end, own.end)] if own.is_last else [])]
    parts = tuple(
        _part(
            stage,
            LayerRange(
                stage=own.stage * len(spans) + number,
                num_stages=own.num_stages * len(spans),
                first=first,
                end=end,
            ),
        )
        for number, (first, end) in enumerate(spans)
    )
    return parts if _are_whole(parts, stage) else (stage,)


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of layers of a whole model or of a stage's, and its name in the base model.

    Raises:
        UnsupportedModelError: there is none.
    """
    base = model.base_model
    for name, child in base.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers:
            return name, child
    raise UnsupportedModelError(f"{model.config.model_type}: no list of layers in {type(base).__name__}")


def remove_ends(model: Any, layers: LayerRange) -> None:
    """Take away what comes before the layers and behind them, where others have that."""
    base, (layers_name, _) = model.base_model, find_layers(model)
    children = list(base.named_children())
    start = [name for name, _ in children].index(layers_name)
    if not layers.is_first:
        keep_embedding = layers.is_last and model.all_tied_weights_keys
        for name, child in children[:start]:
            if child is base.get_input_embeddings():
                setattr(base, name, child if keep_embedding else nn.Identity())
            elif "rotary" not in name:
                is_added = isinstance(child, nn.Embedding | _Zeros)
                setattr(base, name, _Zeros() if is_added else nn.Identity())
        if hasattr(base, "embedding_multiplier"):
            base.embedding_multiplier = 1.0
    if not layers.is_last:
        for name, _ in children[start + 1 :]:
            if "rotary" not in name:
                setattr(base, name, nn.Identity())
        for name, child in list(model.named_children()):
            if child is not base:
                setattr(model, name, nn.Identity())
        model.all_tied_weights_keys = {}


def with_layers(config: Any, first: int, end: int) -> Any:
    """A copy of the config that counts only those layers."""
    sliced = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        sliced.layer_types = config.layer_types[first:end]
    sliced.num_hidden_layers = end - first
    return sliced


class Layers(nn.ModuleList):
    """A list whose full slice is itself: models slice it in each forward, which is slow."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and index.indices(len(self)) == (0, len(self), 1):
            return self
        return super().__getitem__(index)


class _Zeros(nn.Module):
    """Stands for a learned position embedding on stages whose input has it already."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros((), device=positions.device)


def _part(stage: Stage, layers: LayerRange) -> Stage:
    model, base = _twin(stage.model), _twin(stage.model.base_model)
    setattr(model, model.base_model_prefix, base)
    remove_ends(model, layers)
    layers_name, layer_list = find_layers(stage.model)
    first, end = layers.first - stage.layers.first, layers.end - stage.layers.first
    setattr(base, layers_name, Layers(list(layer_list)[first:end]))
    model.config = base.config = with_layers(stage.config, first, end)
    return Stage(model, layers, {}, tied_embedding_name=None)


def _twin(module: nn.Module) -> Any:
    """Another module with the same ones inside, which may be replaced in it alone."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _are_whole(parts: tuple[Stage, ...], stage: Stage) -> bool:
    """Whether the parts together are the stage: some models do more between embedding and layers."""
    positions, like = torch.arange(2), next(iter(stage.parameters()))
    if stage.layers.is_first:
        inputs = positions
    else:
        inputs = torch.linspace(-1.0, 1.0, 2 * stage.hidden_size, dtype=like.dtype).view(2, -1)
    positions, inputs = positions.to(like.device), inputs.to(like.device)
    with torch.no_grad():
        expected, hidden = stage.forward(inputs, positions, PackedSegments((2,))), inputs
        for part in parts:
            hidden = part.forward(hidden, positions, PackedSegments((2,)))
    return torch.equal(hidden, expected)
