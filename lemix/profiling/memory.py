"""The memory that a stage needs on its device: counted from its tensors, activations measured on CUDA."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from lemix.profiling.pipeline import MeasuredOp
from shared.model.loader import load_stage
from shared.model.partition import LayerRange
from shared.model.stage import Stage
from shared.profiles.records import StageMemory
from shared.profiles.roofline import ACTIVATION_BYTES, USABLE_MEMORY, WEIGHT_BYTES

TRAINING_TENSORS = 3
"""As large as the weights each: their gradients and both of AdamW's moments."""


def stage_memory(
    folder: Path, layers: LayerRange, device: str, measured: Iterable[MeasuredOp]
) -> StageMemory:
    """Count the memory of the stage with these `layers`; `measured` are ops of that stage."""
    stage = load_stage(folder, layers)
    weights_bytes = sum(tensor.numel() * tensor.element_size() for tensor in stage.named_tensors().values())
    return StageMemory(
        weights_bytes=weights_bytes,
        training_bytes=TRAINING_TENSORS * weights_bytes,
        kv_bytes_per_token=_kv_bytes_per_token(stage),
        activation_bytes_per_token=_peak_per_token(measured) or _activation_bytes_per_token(stage),
        capacity_bytes=int(USABLE_MEMORY * _device_bytes(device, layers.num_stages)),
    )


def _element_bytes(stage: Stage) -> int:
    return next(iter(stage.named_tensors().values())).element_size()


def _kv_bytes_per_token(stage: Stage) -> int:
    config = stage.config
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(num_heads * head_size) * stage.layers.num_layers * _element_bytes(stage)


def _peak_per_token(measured: Iterable[MeasuredOp]) -> int | None:
    """Peak memory per token of the largest microbatch's forward (CUDA); its constant parts count least."""
    peaks = [
        (op.work.num_tokens, op.peak_bytes)
        for op in measured
        if op.kind == "forward" and op.peak_bytes is not None
    ]
    if not peaks:
        return None
    num_tokens, peak_bytes = max(peaks)
    return -(-peak_bytes // num_tokens)


def _activation_bytes_per_token(stage: Stage) -> int:
    """Elsewhere nothing tells an op's peak: the roofline's formula, in this stage's precision."""
    of_layers = ACTIVATION_BYTES * stage.hidden_size * stage.layers.num_layers
    return of_layers * _element_bytes(stage) // WEIGHT_BYTES


def _device_bytes(device: str, num_stages: int) -> int:
    """All of a CUDA device; an even share of the machine's memory for a stage on its processor."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_stages
