"""Builds one stage of a Hugging Face causal LM, reading only the tensors which that stage owns.

The model's own class is used, so its forward, its dtypes and its checkpoint conversions are the library's.
The order matters: modules of other stages are taken away before loading (so that nothing is read for them)
while the layers are renumbered only after it (so that names in the checkpoint and in the model agree).
"""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from shared.errors import ConfigurationError, UnsupportedModelError
from shared.model.attention import ATTENTION_NAME, LAYER_ATTRIBUTE, PackedSegments
from shared.model.cutting import Layers, find_layers, remove_ends, with_layers
from shared.model.index import INDEX_NAME
from shared.model.partition import LayerRange, partition
from shared.model.stage import Slot, Stage

_from_pretrained_lock = threading.Lock()
"""transformers changes global state while it loads; stages of one process load one after the other."""

_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}


def load_stage(
    folder: Path, layers: LayerRange, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Stage:
    """Load the layers of one stage from a folder of `config.json` and safetensors.

    Files that hold none of the stage's tensors may be absent. Weights stored in another dtype are
    converted. The stage is in evaluation mode (no dropout) and its parameters require gradients.

    Raises:
        UnsupportedModelError: the model cannot be split, or its attention is not plain.
        ConfigurationError: the folder lacks a tensor of this stage, or `layers` does not fit the model.
    """
    config = read_config(folder)
    model_class = _splittable_class(config)
    if layers.end > config.num_hidden_layers:
        raise ConfigurationError(f"{layers} does not fit a model of {config.num_hidden_layers} layers")
    with _from_pretrained_lock, ExitStack() as files:
        files.enter_context(_no_progress_bar())
        tensors = _lazy_tensors(folder, files)
        if config.tie_word_embeddings and _has_own_head(folder, tensors, model_class):
            config.tie_word_embeddings = False
        model, info = _stage_class(model_class, layers).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            output_loading_info=True,
        )
    _check_loaded(info, folder, layers)
    stage = _finish(model, layers).to(device)
    _probe(stage, dtype, device)
    return stage


def read_config(folder: Path) -> Any:
    """The Hugging Face config in `folder`.

    Raises:
        UnsupportedModelError: its model type is unknown, or is known only to code shipped with the model.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"{folder}: no such model type in this transformers: {error}") from error


def model_partition(config: Any, num_stages: int) -> tuple[LayerRange, ...]:
    """Cut a model so that the weights each token passes through are even between stages.

    The head counts hidden size times vocabulary, tied or not.

    Raises:
        UnsupportedModelError: the model cannot be split.
        ConfigurationError: `num_stages` does not fit the number of layers.
    """
    model_class = _splittable_class(config)
    with torch.device("meta"):
        one_layer = model_class(with_layers(config, 0, 1))
    layer_cost = sum(parameter.numel() for parameter in find_layers(one_layer)[1].parameters())
    return partition(
        config.num_hidden_layers,
        num_stages,
        layer_cost=layer_cost,
        head_cost=config.hidden_size * config.vocab_size,
    )


def in_published_names(stage: Stage, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stage's tensors as the checkpoint names and shapes them, ready for a shard of the whole model.

    `tensors`: by the names of `Stage.base_tensors`. Shards of all stages with an index
    (`shared.model.index`) are what `from_pretrained` reads as a whole. The tied copy on the last stage is
    left out. The results share memory with `tensors`.
    """
    names = {name: tensor.detach() for name, tensor in tensors.items()}
    if stage.tied_embedding_name is not None and not stage.layers.is_first:
        del names[stage.tied_embedding_name]
    reverted: dict[str, Tensor] = revert_weight_conversion(stage.model, names)
    return {name: tensor.contiguous() for name, tensor in reverted.items()}


def _splittable_class(config: Any) -> Any:
    kind = config.model_type
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise UnsupportedModelError(f"{kind}: not a decoder-only text model")
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None:
        raise UnsupportedModelError(f"{kind}: transformers has no causal language model of this type")
    if isinstance(model_class, tuple):
        raise UnsupportedModelError(f"{kind}: more than one causal language model class")
    if not model_class.is_backend_compatible():
        raise UnsupportedModelError(f"{kind}: its attention is not behind transformers' interface")
    unknown = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if unknown:
        raise UnsupportedModelError(f"{kind}: layers of type {', '.join(sorted(unknown))} are not supported")
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{kind}: layers which share keys and values are not supported")
    return model_class


def _stage_class(model_class: Any, layers: LayerRange) -> Any:
    """A subclass which lacks the modules of the other stages before any weight is read."""

    class StageModel(model_class):  # type: ignore[misc]  # transformers' classes are untyped
        _keys_to_ignore_on_load_unexpected = (".*",)  # tensors of other stages are no news

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            remove_ends(self, layers)
            _remove_other_layers(self, layers)

    StageModel.__name__ = StageModel.__qualname__ = model_class.__name__
    StageModel.__module__ = (
        model_class.__module__
    )  # else it passes for custom code, loaded without conversions
    return StageModel


def _remove_other_layers(model: Any, layers: LayerRange) -> None:
    _, layer_list = find_layers(model)
    for number in range(model.config.num_hidden_layers):
        if not layers.first <= number < layers.end:
            layer_list[number] = nn.Identity()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers is untyped here
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # transformers is untyped here


def _lazy_tensors(folder: Path, files: ExitStack) -> dict[str, Any]:
    """The tensors of all files that are there, none of them read yet."""
    tensors: dict[str, Any] = {}
    for path in _weight_files(folder):
        file = files.enter_context(safe_open(path, framework="pt"))
        tensors.update({name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def _has_own_head(folder: Path, tensors: Mapping[str, Any], model_class: Any) -> bool:
    """Whether the files have a head that is not the embedding, although the config calls them tied.

    All stages must say the same: the first one would wait for the last one's gradient of a tied embedding.
    Raises ConfigurationError where the file that tells is absent.
    """
    index = folder / INDEX_NAME
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.exists() else {}
    for head, embedding in (model_class._tied_weights_keys or {}).items():
        ending = "." + embedding.rpartition(".weight")[0].rpartition(".")[2] + ".weight"
        of_embedding = next((name for name in tensors if f".{name}".endswith(ending)), None)
        if head in listed and (head not in tensors or of_embedding is None):
            raise ConfigurationError(
                f"{folder}: config.json ties the head to the embedding, and the files have both: all stages "
                f"need {listed[head]} and the embedding's file, to see whether they are the same"
            )
        if head in tensors and of_embedding is not None:
            return not torch.equal(tensors[head][:], tensors[of_embedding][:])
    return False


def _weight_files(folder: Path) -> Iterator[Path]:
    index = folder / INDEX_NAME
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        yield from (folder / name for name in names if (folder / name).exists())
    elif (folder / "model.safetensors").exists():
        yield folder / "model.safetensors"
    else:
        raise ConfigurationError(f"{folder}: neither {INDEX_NAME} nor model.safetensors")


def _check_loaded(info: dict[str, Any], folder: Path, layers: LayerRange) -> None:
    for problem in ("missing_keys", "mismatched_keys", "conversion_errors", "error_msgs"):
        if info.get(problem):
            names = ", ".join(str(name) for name in sorted(info[problem])[:5])
            raise ConfigurationError(f"{folder}: stage {layers.stage} has {problem}: {names}")


def _finish(model: Any, layers: LayerRange) -> Stage:
    base, (layers_name, layer_list) = model.base_model, find_layers(model)
    tied_name = _tied_embedding_name(model, layers)
    slots = _slots(model, layers, tied_name)
    if not layers.is_first:
        _drop_embedding(base)
    own = list(layer_list)[layers.first : layers.end]
    setattr(base, layers_name, Layers(own))
    for number, layer in enumerate(own):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, LAYER_ATTRIBUTE, number)
    sliced = with_layers(model.config, layers.first, layers.end)
    for module in model.modules():
        if getattr(module, "config", None) is model.config and module is not model:
            module.config = sliced
    model.config = sliced
    return Stage(model, layers, slots, tied_embedding_name=tied_name)


def _tied_embedding_name(model: Any, layers: LayerRange) -> str | None:
    if not model.config.tie_word_embeddings or not (layers.is_first or layers.is_last):
        return None
    embedding = model.get_input_embeddings().weight
    if layers.is_last and model.get_output_embeddings().weight is not embedding:
        return None
    name: str = next(name for name, parameter in model.named_parameters() if parameter is embedding)
    return name


def _slots(model: Any, layers: LayerRange, tied_name: str | None) -> dict[str, tuple[Slot, ...]]:
    """Where each parameter hangs; a tied one hangs in each module that is left after loading."""
    embedding = model.get_input_embeddings()
    slots: dict[str, tuple[Slot, ...]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        path, _, local_name = name.rpartition(".")
        module = model.get_submodule(path)
        if module is embedding and not layers.is_first:
            continue
        is_tied_head = tied_name is not None and module is model.get_output_embeddings()
        global_name = tied_name if is_tied_head and tied_name is not None and local_name == "weight" else name
        slots[global_name] = (*slots.get(global_name, ()), (module._parameters, local_name))
    return slots


def _drop_embedding(base: Any) -> None:
    embedding = base.get_input_embeddings()
    for name, child in list(base.named_children()):
        if child is embedding:
            setattr(base, name, nn.Identity())


def _probe(stage: Stage, dtype: torch.dtype, device: str) -> None:
    """Run one token and see each layer come to attention once, so that what cannot work fails now."""
    seen = _Recorder()
    first = stage.layers.is_first
    shape, kind = ((1,), torch.int64) if first else ((1, stage.hidden_size), dtype)
    inputs = torch.zeros(shape, dtype=kind, device=device)
    try:
        with torch.no_grad():
            stage.forward(inputs, torch.zeros(1, dtype=torch.int64, device=device), seen)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{stage.config.model_type}: {error}") from error
    if seen.layers != list(range(stage.layers.num_layers)):
        raise UnsupportedModelError(
            f"{stage.config.model_type}: attention ran for layers {seen.layers} of {stage.layers.num_layers}"
        )


class _Recorder:
    def __init__(self) -> None:
        self.layers: list[int] = []

    def attend(
        self,
        layer: int,
        query_1NTD: Tensor,
        key_1KTD: Tensor,
        value_1KTD: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        self.layers.append(layer)
        return PackedSegments((1,)).attend(
            layer, query_1NTD, key_1KTD, value_1KTD, scaling=scaling, sliding_window=sliding_window
        )
