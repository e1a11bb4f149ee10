"""LoRA: small trained matrices beside the linear modules of a stage, whose own weights stay as they are.

A module with the weight W [out, in] computes `x W^T + (alpha / rank) x A^T B^T`, of which A [rank, in] and
B [out, rank] train (Hu et al. 2021, https://arxiv.org/abs/2106.09685). The modules, the files and their
names are those of `peft`; the names count layers through the whole model, so that an adapter saved by any
number of stages is one adapter.

`peft` is imported where it is needed: stages without an adapter need not wait for it.
"""

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shared.checkpoints import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from shared.errors import ConfigurationError
from shared.model.cutting import find_layers
from shared.model.loader import in_published_names
from shared.model.stage import Slot, Stage

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR: Final = "all-linear"
"""A target that stands for each linear module of the layers, but not the embedding or the head."""

_FILE_PREFIX: Final = "base_model.model."
"""The prefix of a module's name in peft's files, before its name in the whole model."""
_PEFT_NAME: Final = "default"
"""peft can keep several adapters in a model; this is the name of the only one here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """`targets`: names of linear modules as they are in a layer (`q_proj`), or `ALL_LINEAR` alone."""

    rank: int
    alpha: int
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LowRank:
    """The matrices A [rank, in] and B [out, rank] of one module, by the tables that they are swapped in."""

    down: dict[str, nn.Parameter | None]
    up: dict[str, nn.Parameter | None]
    scaling: float

    def add_to(self, outputs: Tensor, inputs: Tensor) -> None:
        """Add the adapter's share to the module's outputs [T, out], in place; inputs [T, in]."""
        down, up = self.down["weight"], self.up["weight"]
        assert down is not None and up is not None
        outputs.addmm_(inputs @ down.t(), up.t(), alpha=self.scaling)


def add_adapter(stage: Stage, settings: LoraSettings) -> None:
    """Give the stage an adapter that changes nothing yet, and freeze all else.

    Raises:
        ConfigurationError: a target is no linear module of the stage's layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = _find_targets(stage, settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in targets.values()),
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, stage.model, adapter_name=_PEFT_NAME)
    slots: dict[str, Slot] = {}
    for module in _adapted_modules(stage):
        low_rank = low_rank_of(module)
        assert low_rank is not None
        name = stage.module_name(base_module(module))
        slots[f"{name}.lora_A.weight"] = (low_rank.down, "weight")
        slots[f"{name}.lora_B.weight"] = (low_rank.up, "weight")
    stage.add_adapter(slots)
    with torch.no_grad():
        for name, tensor in initial_adapter(stage).items():
            stage.parameter(name).copy_(tensor)


def initial_adapter(stage: Stage) -> dict[str, Tensor]:
    """The first values of an adapter, by name: A random, the same for any number of stages, and B zero."""
    return {name: _initial(name, stage.parameter(name)) for name in stage.adapter_names}


def read_adapter(stage: Stage, folder: Path) -> dict[str, Tensor]:
    """The tensors of the stage's adapter, by name, from a folder of peft's files.

    Raises:
        ConfigurationError: the folder has no adapter, or one of another rank, alpha or other targets.
    """
    _check_same_shape(stage, folder)
    with safe_open(folder / ADAPTER_NAME, framework="pt") as file:
        return {name: file.get_tensor(_FILE_PREFIX + name) for name in stage.adapter_names}


def in_adapter_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an adapter by `Stage.adapter_names`, as peft's files name them; they share memory."""
    return {_FILE_PREFIX + name: tensor.detach() for name, tensor in tensors.items()}


def merged_state_dict(stage: Stage) -> dict[str, Tensor]:
    """The stage's weights with the adapter in them, named and shaped as the checkpoint does.

    Weights with an adapter are copies; all others share memory with the stage.
    """
    tensors: dict[str, Tensor] = dict(stage.base_tensors())
    with torch.no_grad():
        for module in _adapted_modules(stage):
            base = base_module(module)
            name = f"{stage.module_name(base)}.weight"
            tensors[name] = tensors[name] + module.get_delta_weight(_PEFT_NAME)
    return in_published_names(stage, tensors)


def adapter_config(stage: Stage, base_model: str) -> "LoraConfig":
    """The config that peft keeps beside an adapter's weights; `base_model` is a folder or a hub name."""
    config = copy.copy(_peft_config(stage))
    config.target_modules = _target_names(stage)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    return config


def low_rank_of(module: nn.Module) -> LowRank | None:
    """The adapter of a linear module, None where it has none."""
    if not _is_adapted(module):
        return None
    parts: Any = module
    down, up = parts.lora_A[_PEFT_NAME], parts.lora_B[_PEFT_NAME]
    return LowRank(down._parameters, up._parameters, parts.scaling[_PEFT_NAME])


def base_module(module: nn.Module) -> nn.Module:
    """The linear module itself, without its adapter."""
    base = module.base_layer if _is_adapted(module) else module
    assert isinstance(base, nn.Module)
    return base


def linear_modules(model: nn.Module) -> list[nn.Module]:
    """All linear modules, those with an adapter as one each."""
    inner = {part for module in model.modules() if _is_adapted(module) for part in list(module.modules())[1:]}
    return [
        module
        for module in model.modules()
        if module not in inner and (_is_adapted(module) or isinstance(module, nn.Linear | Conv1D))
    ]


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A")


def _adapted_modules(stage: Stage) -> Iterator[Any]:
    return (module for module in stage.model.modules() if _is_adapted(module))


def _find_targets(stage: Stage, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules that get an adapter, by their names in this stage's model."""
    in_layers = {*find_layers(stage.model)[1].modules()}
    linear = {
        name: module
        for name, module in stage.model.named_modules()
        if module in in_layers and isinstance(module, nn.Linear | Conv1D)
    }
    known = {name.rpartition(".")[2] for name in linear}
    wanted = known if targets == (ALL_LINEAR,) else set(targets)
    if not wanted or wanted - known:
        raise ConfigurationError(
            f"LoRA targets {', '.join(sorted(wanted - known))}: no such linear module in the layers of this "
            f"{stage.config.model_type}, which have {', '.join(sorted(known))}"
        )
    return {name: module for name, module in linear.items() if name.rpartition(".")[2] in wanted}


def _initial(name: str, like: Tensor) -> Tensor:
    """The first values as in peft, except for the random numbers, which depend only on the name."""
    tensor = torch.zeros(like.shape, dtype=like.dtype)
    if name.endswith(".lora_A.weight"):
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
    return tensor


def _peft_config(stage: Stage) -> "LoraConfig":
    config: LoraConfig = stage.model.peft_config[_PEFT_NAME]
    return config


def _target_names(stage: Stage) -> list[str]:
    return sorted({name.split(".")[-3] for name in stage.adapter_names})


def _check_same_shape(stage: Stage, folder: Path) -> None:
    from peft import PeftConfig

    if not (folder / ADAPTER_CONFIG_NAME).exists():
        raise ConfigurationError(f"{folder} has no adapter: {ADAPTER_CONFIG_NAME} is missing")
    config, saved = _peft_config(stage), PeftConfig.from_pretrained(str(folder))
    pairs: Mapping[str, tuple[object, object]] = {
        "rank": (saved.r, config.r),
        "alpha": (saved.lora_alpha, config.lora_alpha),
        "targets": (sorted(saved.target_modules), _target_names(stage)),
    }
    for what, (had, wanted) in pairs.items():
        if had != wanted:
            raise ConfigurationError(
                f"{folder} has a LoRA adapter of {what} {had}, not {wanted}: "
                f"set LEMIX_LORA_{what.upper()} to what it was, or choose another --name"
            )
