"""Mixed precision: a stage computes in one dtype, its weights are learned in float32."""

from typing import Any

import torch
from torch.nn import Parameter

from shared.model.stage import Stage


def cast_parameters(stage: Stage, dtype: torch.dtype) -> None:
    """Put parameters of `dtype` in place of the stage's; those of that dtype stay.

    Buffers stay as they are: rotary frequencies need float32 at any dtype.
    """
    for name, parameter in stage.named_tensors().items():
        if parameter.dtype != dtype:
            stage.set_parameter(name, Parameter(parameter.data.to(dtype), parameter.requires_grad))


def chosen_dtype(setting: str, config: Any, device: torch.device) -> torch.dtype:
    """The dtype that a stage computes in: the one that is set, or with `auto` on a GPU the published model's.

    A model in float16 is computed in bfloat16: its gradients need the range.
    """
    if setting != "auto":
        chosen: torch.dtype = getattr(torch, setting)
        return chosen
    is_half = config.dtype in (torch.float16, torch.bfloat16)
    return torch.bfloat16 if is_half and device.type == "cuda" else torch.float32
