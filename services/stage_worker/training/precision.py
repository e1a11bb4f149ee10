"""Mixed precision: a stage computes in one dtype, its weights are learned in float32."""

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
