"""How many keys and values fit a device beside the weights and what training them takes."""

import logging
from dataclasses import dataclass

import torch

from services.stage_worker.settings import StageWorkerSettings
from shared.errors import ConfigurationError
from shared.model.stage import Stage
from shared.profiles.roofline import ACTIVATION_BYTES, LOGIT_BYTES, WEIGHT_BYTES
from shared.training_memory import MASTER_BYTES, bytes_beside

_GIB = 2**30

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """In bytes; the stage's weights and masters are in it already."""

    free: int
    total: int


def device_memory(device: torch.device) -> DeviceMemory | None:
    """None on the CPU, where memory is taken only as it is used."""
    return DeviceMemory(*torch.cuda.mem_get_info(device)) if device.type == "cuda" else None


def weight_bytes(stage: Stage, dtype: torch.dtype) -> int:
    """Bytes of the weights that serve, and of their masters in float32 where these are others."""
    num_trained = sum(tensor.numel() for tensor in stage.trainable_tensors().values())
    masters = 0 if dtype == torch.float32 else MASTER_BYTES * num_trained
    return masters + sum(tensor.nbytes for tensor in stage.named_tensors().values())


def training_bytes(stage: Stage, dtype: torch.dtype, settings: StageWorkerSettings) -> int:
    """Bytes that a step needs at most beside the weights, and those of activations in flight."""
    num_trained = sum(tensor.numel() for tensor in stage.trainable_tensors().values())
    learning = num_trained * bytes_beside(dtype.itemsize)
    layers = stage.layers
    per_token = ACTIVATION_BYTES * stage.hidden_size * layers.num_layers
    per_token += layers.is_last * LOGIT_BYTES * stage.vocab_size
    in_flight = settings.max_microbatch_tokens * (layers.num_stages - layers.stage)
    return learning + in_flight * per_token * dtype.itemsize // WEIGHT_BYTES


def blocks_that_fit(
    memory: DeviceMemory, *, share: float, num_stages: int, held: int, training: int, block_bytes: int
) -> int:
    """Blocks of the KV cache; all but the last argument in bytes, or parts of the device.

    A stage's part is the device's `share` divided by the stages there, less the weights that it holds and
    what training takes; and no more than is free.
    """
    part = share * memory.total / num_stages - held
    free = memory.free - (1 - share) * memory.total
    num_blocks = int((min(part, free) - training) // block_bytes)
    return num_blocks - 1  # one more belongs to rows that only fill up a batch


def num_kv_blocks(
    settings: StageWorkerSettings,
    stage: Stage,
    dtype: torch.dtype,
    *,
    block_bytes: int,
    memory: DeviceMemory | None,
) -> int:
    """As many blocks as were asked for, or as fit the device. Raises ConfigurationError when none does."""
    if settings.kv_tokens is not None or memory is None:
        return settings.num_kv_blocks
    training = training_bytes(stage, dtype, settings)
    num_blocks = blocks_that_fit(
        memory,
        share=settings.memory_share,
        num_stages=settings.stages_on_device,
        held=weight_bytes(stage, dtype),
        training=training,
        block_bytes=block_bytes,
    )
    if num_blocks < 1:
        raise ConfigurationError(
            f"no room for keys and values on {settings.device}: {memory.free / _GIB:.1f} of "
            f"{memory.total / _GIB:.1f} GiB are free, and training may take {training / _GIB:.1f}. Lower "
            "LEMIX_MAX_MICROBATCH_TOKENS, set LEMIX_ADAPTER=lora, or use more stages"
        )
    logger.info(
        "stage %d: room for %d tokens in the KV cache (%.1f GiB of %s), %.1f GiB left for training",
        settings.stage,
        num_blocks * settings.kv_block_size,
        num_blocks * block_bytes / _GIB,
        settings.device,
        training / _GIB,
    )
    return num_blocks
